"""`perseid adapters load|unload|list|show|pin|unpin`: adapters, gate sets and heads of a running server, over gRPC."""

from datetime import datetime
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from perseid_protos.perseid.v1 import adapter_admin_pb2 as pb
from perseid_protos.perseid.v1 import adapter_admin_pb2_grpc as stubs
from perseid_server.cli.client import HERE, Connection, To, connected
from perseid_server.cli.heads import for_whom, heads_rows

adapters = App(
    name="adapters", help="Load, unload and look at the adapters, gate sets and Medusa heads of a running server."
)

_MIB = 1 << 20


@adapters.command
def load(
    name: str,
    source: str,
    /,
    *,
    replace: bool = False,
    pin: bool = False,
    adapter: Annotated[str | None, Parameter(name="--for")] = None,
    to: To = HERE,
) -> None:
    """Load an adapter, a gate set or Medusa heads and serve it under a name.

    Parameters
    ----------
    name
        What clients will call it.
    source
        A folder on the server's machine below one of its adapter roots, or a hub id org/name[@revision]. A folder
        that exists here is sent by its full path.
    replace
        Take the place of what has that name; running requests end on the old one.
    pin
        Keep it on the device.
    adapter
        Of Medusa heads: the loaded adapter whose requests they draft for. Default: the one that their own file tells,
        else the base. Of several heads that fit a request, those loaded last draft for it.
    """
    with connected(to) as channel:
        request = pb.LoadAdapterRequest(
            name=name, source=_full_path(source), replace=replace, pin=pin, adapter=adapter or ""
        )
        _print(stubs.AdapterAdminStub(channel).LoadAdapter(request).adapter)


@adapters.command
def unload(name: str, /, *, to: To = HERE) -> None:
    """Take an adapter, a gate set or heads away; requests that began with an adapter or a gate set end with it."""
    with connected(to) as channel:
        stubs.AdapterAdminStub(channel).UnloadAdapter(pb.UnloadAdapterRequest(name=name))


@adapters.command
def pin(name: str, /, *, to: To = HERE) -> None:
    """Keep an adapter or a gate set on the device."""
    _pin(to, name, pinned=True)


@adapters.command
def unpin(name: str, /, *, to: To = HERE) -> None:
    """Let an adapter or a gate set leave the device when others need its room."""
    _pin(to, name, pinned=False)


@adapters.command(name="list")
def list_all(*, to: To = HERE) -> None:
    """List all adapters, gate sets and Medusa heads. Of several heads that fit a request, those loaded last draft."""
    with connected(to) as channel:
        found = stubs.AdapterAdminStub(channel).ListAdapters(pb.ListAdaptersRequest()).adapters
    table = Table("name", "version", "rank", "MiB", "location", "targets", box=None, padding=(0, 2, 0, 0))
    for adapter in found:
        table.add_row(
            adapter.name,
            adapter.version[:8],
            str(adapter.rank) if adapter.rank else adapter.kind,
            f"{adapter.size_bytes / _MIB:.1f}",
            _location(adapter),
            _targets(adapter),
        )
    Console().print(table)


@adapters.command
def show(name: str, /, *, to: To = HERE) -> None:
    """Describe one adapter, gate set, or set of heads."""
    with connected(to) as channel:
        _print(stubs.AdapterAdminStub(channel).GetAdapter(pb.GetAdapterRequest(name=name)).adapter)


def _full_path(source: str) -> str:
    """The server does not know our working folder."""
    folder = Path(source)
    return str(folder.absolute()) if folder.is_dir() else source


def _pin(to: Connection, name: str, *, pinned: bool) -> None:
    with connected(to) as channel:
        _print(stubs.AdapterAdminStub(channel).PinAdapter(pb.PinAdapterRequest(name=name, pinned=pinned)).adapter)


def _print(adapter: pb.Adapter) -> None:
    console = Console(highlight=False)
    rows = {
        "name": adapter.name,
        "version": adapter.version,
        **_kind_rows(adapter),
        "parameters": f"{adapter.num_parameters:,}",
        "size": f"{adapter.size_bytes / _MIB:.1f} MiB",
        "trained on": adapter.trained_on or "not stated",
        "source": adapter.source,
        "loaded": datetime.fromtimestamp(adapter.loaded_at).astimezone().isoformat(timespec="seconds"),
        "location": _location(adapter),
    }
    for name, value in rows.items():
        console.print(f"{name:<12}{value}")
    for column in adapter.gate_set.columns:
        console.print(f"{'adapter':<12}{_column(column)}")
    if adapter.error:
        console.print(f"{'error':<12}{adapter.error}")
    for warning in adapter.warnings:
        console.print(f"{'warning':<12}{warning}")


def _kind_rows(adapter: pb.Adapter) -> dict[str, str]:
    if adapter.HasField("heads"):
        return heads_rows(adapter.heads, adapter.num_layers)
    kind = f"{adapter.kind}, rank {adapter.rank}" if adapter.rank else _gates(adapter.gate_set)
    return {"kind": kind, "targets": f"{', '.join(adapter.targets)} in {adapter.num_layers} layers"}


def _targets(adapter: pb.Adapter) -> str:
    """Which projections; of a gate set, how many of its adapters can be chosen now; of heads, whom they are for."""
    if adapter.HasField("heads"):
        return f"{adapter.heads.num_heads} heads for {for_whom(adapter.heads)}"
    if adapter.HasField("gate_set"):
        columns = adapter.gate_set.columns
        return f"{sum(column.loaded for column in columns)} of {len(columns)} adapters loaded"
    return " ".join(target.removesuffix("_proj") for target in adapter.targets)


def _gates(gate_set: pb.GateSet) -> str:
    parts = [f"gates ({gate_set.method}), k {gate_set.k}, temperature {gate_set.temperature:g}"]
    parts += ["the base may be chosen"] if gate_set.null else []
    parts += ["chooses for whole requests too"] if gate_set.has_request_router else []
    return ", ".join(parts)


def _column(column: pb.GateColumn) -> str:
    state = "loaded" if column.loaded else "not loaded in this version"
    return f"{column.name} {column.version[:8]}, {state}{', training-free' if column.training_free else ''}"


def _location(adapter: pb.Adapter) -> str:
    name = pb.Location.Name(adapter.location).removeprefix("LOCATION_").lower()
    return f"{name}, pinned" if adapter.pinned else name

"""A gate set's folder as data that may be hostile: are these gates of this base, and what are their numbers?

`check_gate_set` decides before anything is accepted, as `check_adapter` does for adapters: what it does not
understand it refuses by name. NumPy only: the API process checks, the engine builds (gate_table.py).
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from perseid_router.gate_set import (
    CONFIG_FILE,
    REQUEST_ROUTER_PREFIX,
    WEIGHTS_FILE,
    Gate,
    GateSetConfig,
    GateSetError,
    TensorKey,
)
from perseid_router.gate_set_config import read_config
from perseid_router.request_router import RequestRouter
from perseid_server.adapters.lora import Site
from perseid_server.adapters.tensor_file import TensorFile
from perseid_server.adapters.untrusted import unreadable
from perseid_server.errors import AdapterRejected
from perseid_server.model.spec import FUSED_LINEARS, BaseSpec

MAX_ROUTER_NUMBERS = 1 << 26
"""Of a request router's tensors together: twice what 512 columns in 2^16 buckets take."""


@dataclass(frozen=True, slots=True)
class GateTensors:
    """The gate of one projection, by the names of its tensors."""

    weight: str
    bias: str | None


@dataclass(frozen=True, slots=True)
class GateSetInfo:
    """What a gate set holds, for people and metrics."""

    kind: str  # "gates"
    method: str
    adapters: tuple[str, ...]  # names, as the file says
    num_columns: int
    num_layers: int  # that have a gate
    targets: tuple[str, ...]  # projections that have a gate, in the base's order
    has_request_router: bool
    num_parameters: int
    nbytes: int  # of the tensor file
    trained_on: str | None  # as the file says
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckedGateSet:
    """A gate set that this base can serve. Its numbers stay in the file until they are asked for."""

    config: GateSetConfig
    gates: Mapping[Site, GateTensors]
    mean_squares: Mapping[tuple[int, str], str]  # layer, fused linear → tensor
    router_tensors: tuple[str, ...]
    file: TensorFile
    info: GateSetInfo

    def gate(self, site: Site) -> Gate:
        """One projection's gate; a bias that the file leaves out is zero."""
        tensors = self.gates[site]
        weight = self.file.read(tensors.weight)
        return Gate(weight, np.zeros(len(weight), np.float32) if tensors.bias is None else self.file.read(tensors.bias))

    def mean_square(self, layer: int, fused: str) -> NDArray[np.float32] | None:
        """E[x²] of a fused linear's inputs, where the file tells: [d_in]."""
        name = self.mean_squares.get((layer, fused))
        return None if name is None else self.file.read(name)

    def request_router(self) -> RequestRouter | None:
        """The request-level router, if the set has one."""
        if self.config.request_router is None:
            return None
        tensors = {name.removeprefix(REQUEST_ROUTER_PREFIX): self.file.read(name) for name in self.router_tensors}
        return RequestRouter.of(self.config.request_router, tensors, len(self.config.adapters))


def read(checked: CheckedGateSet) -> Iterator[tuple[Site, Gate]]:
    """All gates, one after the other."""
    for site in checked.gates:
        yield site, checked.gate(site)


def check_gate_set(folder: Path, base: BaseSpec) -> CheckedGateSet:
    """Read a gate set's folder and hold it against the base. AdapterRejected names the key or tensor that is wrong."""
    try:
        config = read_config(folder)
    except GateSetError as error:
        if isinstance(error.__cause__, OSError):
            raise unreadable(CONFIG_FILE, error.__cause__) from error
        raise AdapterRejected(str(error)) from error
    if not (folder / WEIGHTS_FILE).is_file():
        raise AdapterRejected(f"the gate set has no {WEIGHTS_FILE}; expected it beside {CONFIG_FILE}")
    file = TensorFile.open(folder / WEIGHTS_FILE)
    found = _sort(file, base)
    gates = {site: _gate(site, parts, file, config, base) for site, parts in sorted(found.parts.items())}
    if not gates:
        raise AdapterRejected(f"{WEIGHTS_FILE} holds no gate; expected layers.N.PROJECTION.weight")
    for (_, fused), name in found.mean_squares.items():
        _check_shape(file, name, (base.fused_shape(fused).in_features,), base)
    _check_values(file, tuple(found.mean_squares.values()))
    info = _info(config, gates, file, base)
    checked = CheckedGateSet(config, gates, found.mean_squares, tuple(sorted(found.router)), file, info)
    _check_router(checked)
    return checked


@dataclass(frozen=True, slots=True)
class _Found:
    parts: dict[Site, dict[str, str]]  # part → tensor
    mean_squares: dict[tuple[int, str], str]
    router: list[str]


def _sort(file: TensorFile, base: BaseSpec) -> _Found:
    """Tensor names by what they are. Every tensor must find its place."""
    found = _Found(defaultdict(dict), {}, [])
    for name in file.tensors:
        if name.startswith(REQUEST_ROUTER_PREFIX):
            found.router.append(name)
            continue
        key = TensorKey.parse(name)
        wanted = FUSED_LINEARS if key is not None and key.part == "input_mean_square" else base.projections
        if key is None or key.linear not in wanted:
            raise AdapterRejected(_why_unknown(name, base))
        if key.layer >= base.num_layers:
            raise AdapterRejected(
                f"tensor {name!r} is for layer {key.layer}; the base has layers 0 to {base.num_layers - 1}"
            )
        if key.part == "input_mean_square":
            found.mean_squares[key.layer, key.linear] = name
        else:
            found.parts[Site(key.layer, key.linear)][key.part] = name
    return found


def _why_unknown(name: str, base: BaseSpec) -> str:
    if "lora_" in name or "moe_gate" in name:
        return f"tensor {name!r} belongs to an adapter or to a MeteoRA checkpoint, not to a gate set"
    return (
        f"unknown tensor {name!r}; expected layers.N.PROJECTION.weight or .bias with PROJECTION one of "
        f"{', '.join(base.projections)}, layers.N.LINEAR.input_mean_square with LINEAR one of "
        f"{', '.join(FUSED_LINEARS)}, or {REQUEST_ROUTER_PREFIX}…"
    )


def _gate(site: Site, parts: Mapping[str, str], file: TensorFile, config: GateSetConfig, base: BaseSpec) -> GateTensors:
    if "weight" not in parts:
        raise AdapterRejected(f"tensor {parts['bias']!r} has no weight beside it")
    columns, inputs = config.num_columns, base.projections[site.projection].in_features
    shape = file.tensors[parts["weight"]].shape
    if len(shape) == 2 and shape[0] != columns and shape[1] == inputs:
        null = "and the base" if config.null else "without the base"
        raise AdapterRejected(
            f"tensor {parts['weight']!r} has {shape[0]} rows; {CONFIG_FILE} lists {len(config.adapters)} adapters "
            f"{null}, which makes {columns} columns"
        )
    _check_shape(file, parts["weight"], (columns, inputs), base)
    if "bias" in parts:
        _check_shape(file, parts["bias"], (columns,), base)
    for name in parts.values():
        _refuse_not_finite(name, file.read(name))
    return GateTensors(parts["weight"], parts.get("bias"))


def _check_shape(file: TensorFile, name: str, wanted: tuple[int, ...], base: BaseSpec) -> None:
    shape = file.tensors[name].shape
    if shape != wanted:
        raise AdapterRejected(
            f"tensor {name!r} has the shape {list(shape)}, this base needs {list(wanted)}: the gate set is damaged or "
            f"for a base of another size (this one is {base.name}, hidden size {base.hidden_size})"
        )


def _check_values(file: TensorFile, mean_squares: tuple[str, ...]) -> None:
    for name in mean_squares:
        values = file.read(name)
        _refuse_not_finite(name, values)
        if (values < 0).any():
            raise AdapterRejected(f"tensor {name!r} holds a negative value; expected means of squares")


def _refuse_not_finite(name: str, values: NDArray[np.float32]) -> None:
    if not np.isfinite(values).all():
        raise AdapterRejected(f"tensor {name!r} holds {'NaN' if np.isnan(values).any() else 'Inf'}")


def _check_router(checked: CheckedGateSet) -> None:
    if checked.config.request_router is None and checked.router_tensors:
        raise AdapterRejected(
            f"tensor {checked.router_tensors[0]!r} belongs to a request router, but {CONFIG_FILE} has no request_router"
        )
    numbers = sum(math.prod(checked.file.tensors[name].shape) for name in checked.router_tensors)
    if numbers > MAX_ROUTER_NUMBERS:  # they are read whole
        raise AdapterRejected(
            f"the tensors {REQUEST_ROUTER_PREFIX}* hold {numbers} numbers; expected at most {MAX_ROUTER_NUMBERS}"
        )
    try:
        checked.request_router()
    except GateSetError as error:
        raise AdapterRejected(str(error)) from error


def _info(config: GateSetConfig, gates: Mapping[Site, GateTensors], file: TensorFile, base: BaseSpec) -> GateSetInfo:
    warnings = []
    if config.base and config.base.rstrip("/").rsplit("/", 1)[-1].lower() != base.name.lower():
        warnings.append(f"trained on {config.base}, served on {base.name}")
    return GateSetInfo(
        kind="gates",
        method=config.method,
        adapters=tuple(column.name for column in config.adapters),
        num_columns=config.num_columns,
        num_layers=len({site.layer for site in gates}),
        targets=tuple(name for name in base.projections if any(site.projection == name for site in gates)),
        has_request_router=config.request_router is not None,
        num_parameters=sum(int(np.prod(entry.shape, dtype=np.int64)) for entry in file.tensors.values()),
        nbytes=file.nbytes,
        trained_on=config.base or None,
        warnings=tuple(warnings),
    )

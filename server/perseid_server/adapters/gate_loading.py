"""From a gate set's files, and those of adapters that join it, to a table on the device. Runs on a loader's thread."""

import torch

from perseid_kernels.routing import GateTable
from perseid_server.adapters.gate_residency import GateSource
from perseid_server.adapters.gate_set_file import CheckedGateSet, check_gate_set
from perseid_server.adapters.gate_table import build_table
from perseid_server.adapters.lora import check_adapter
from perseid_server.adapters.lowering import LoweredLinear, lower
from perseid_server.adapters.store import version_of
from perseid_server.adapters.untrusted import unreadable
from perseid_server.errors import AdapterRejected
from perseid_server.model.spec import BaseSpec

VERSION_LENGTH = 64
"""Characters of a content hash, which is the name of a version's folder in the store."""


def load_gate_table(base: BaseSpec, device: torch.device, source: GateSource) -> GateTable:
    """Build a gate set's table. AdapterRejected when its files are gone, changed or not what they were, Unavailable
    when they cannot be read now."""
    checked = _check(base, source)
    num_filed = len(checked.config.adapters) if checked is not None else 0
    joined = [_lowered(base, source, column) for column in range(num_filed, len(source.adapters))]
    return build_table(base, checked, joined, source.null, device)


def _check(base: BaseSpec, source: GateSource) -> CheckedGateSet | None:
    if source.path is None:
        return None
    try:
        if len(source.path.name) == VERSION_LENGTH and version_of(source.path) != source.path.name:
            raise AdapterRejected("its files have changed since it was loaded; load it again")
    except OSError as error:
        raise unreadable("its files", error) from error
    checked = check_gate_set(source.path, base)
    columns = tuple(column.version for column in checked.config.adapters)
    if columns != source.adapters[: len(columns)]:
        raise AdapterRejected("its file names other adapters than the server was told; load it again")
    return checked


def _lowered(base: BaseSpec, source: GateSource, column: int) -> list[LoweredLinear]:
    folder = source.folders[column]
    if folder is None:
        raise AdapterRejected(f"adapter {source.adapters[column][:12]} joins the gate set and is not loaded")
    return list(lower(check_adapter(folder, base), base))

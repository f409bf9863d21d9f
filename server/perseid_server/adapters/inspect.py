"""What a folder holds and whether a base would take it, without raising."""

from dataclasses import dataclass
from pathlib import Path

from perseid_server.adapters.gate_set_file import GateSetInfo, check_gate_set
from perseid_server.adapters.layout import kind_of
from perseid_server.adapters.lora import AdapterInfo, check_adapter
from perseid_server.errors import AdapterRejected
from perseid_server.model.spec import BaseSpec


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """The verdict. `info` is there when the adapter or gate set is accepted, `reason` when it is not."""

    accepted: bool
    info: AdapterInfo | GateSetInfo | None = None
    reason: str | None = None


def inspect_adapter(folder: Path, base: BaseSpec) -> AdapterReport:
    """Check a folder with an adapter or a gate set against a base."""
    check = check_gate_set if kind_of(folder) == "gates" else check_adapter
    try:
        return AdapterReport(True, info=check(folder, base).info)
    except AdapterRejected as error:
        return AdapterReport(False, reason=error.message)

"""What a folder holds and whether a base would take it, without raising."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from perseid_server.adapters.gate_set_file import GateSetInfo, check_gate_set
from perseid_server.adapters.intake import is_checkpoint
from perseid_server.adapters.layout import kind_of
from perseid_server.adapters.lora import AdapterInfo, check_adapter
from perseid_server.adapters.meteora import split_meteora
from perseid_server.errors import AdapterRejected
from perseid_server.model.spec import BaseSpec
from perseid_server.speculation.heads_file import HeadsInfo, check_heads


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """The verdict. `info` is there when what was looked at is accepted, `reason` when it is not."""

    accepted: bool
    info: AdapterInfo | GateSetInfo | HeadsInfo | None = None
    reason: str | None = None


def inspect_adapter(folder: Path, base: BaseSpec) -> AdapterReport:
    """Check a folder with an adapter, a gate set, heads, or a MeteoRA checkpoint (told by its gate set) against a
    base."""
    try:
        if is_checkpoint(folder):
            return AdapterReport(True, info=_inspect_checkpoint(folder, base))
        match kind_of(folder):
            case "gates":
                return AdapterReport(True, info=check_gate_set(folder, base).info)
            case "heads":
                return AdapterReport(True, info=check_heads(folder, base).info)
            case "adapter":
                return AdapterReport(True, info=check_adapter(folder, base).info)
    except AdapterRejected as error:
        return AdapterReport(False, reason=error.message)


def _inspect_checkpoint(folder: Path, base: BaseSpec) -> GateSetInfo:
    """What is checked is what would be served: its parts."""
    with tempfile.TemporaryDirectory() as scratch:
        parts = split_meteora(folder, Path(scratch) / "parts", base)
        info = check_gate_set(parts.gate_set_folder, base).info
        return replace(info, warnings=parts.warnings)

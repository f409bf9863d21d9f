"""What an adapter folder holds and whether a base would take it, without raising."""

from dataclasses import dataclass
from pathlib import Path

from perseid_server.adapters.lora import AdapterInfo, check_adapter
from perseid_server.errors import AdapterRejected
from perseid_server.model.spec import BaseSpec


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """The verdict. `info` is there when the adapter is accepted, `reason` when it is not."""

    accepted: bool
    info: AdapterInfo | None = None
    reason: str | None = None


def inspect_adapter(folder: Path, base: BaseSpec) -> AdapterReport:
    """Check a folder against a base."""
    try:
        return AdapterReport(True, info=check_adapter(folder, base).info)
    except AdapterRejected as error:
        return AdapterReport(False, reason=error.message)

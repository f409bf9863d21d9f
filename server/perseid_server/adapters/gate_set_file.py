"""Provisional reader of gate sets; the branch `gatefiles` has the real one."""

import json
from dataclasses import dataclass
from pathlib import Path

from perseid_router.gate_set import CONFIG_FILE, WEIGHTS_FILE, Column, GateSetConfig
from perseid_server.errors import AdapterRejected
from perseid_server.model.spec import BaseSpec


@dataclass(frozen=True, slots=True)
class CheckedGateSet:
    config: GateSetConfig
    nbytes: int


def check_gate_set(folder: Path, base: BaseSpec) -> CheckedGateSet:
    try:
        fields = json.loads((folder / CONFIG_FILE).read_text())
        fields.pop("format", None), fields.pop("schema", None)
        columns = tuple(Column(**column) for column in fields.pop("adapters"))
        return CheckedGateSet(GateSetConfig(columns, **fields), (folder / WEIGHTS_FILE).stat().st_size)
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterRejected(f"{CONFIG_FILE}: {error}") from error

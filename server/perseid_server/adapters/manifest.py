"""The store's manifest: names and the versions they stand for, with a checksum. Standard library only."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from perseid_server.adapters.layout import FILES, Kind

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """A name and the version it stands for. Manifests name no kind that were written before there were gate sets, and
    no adapter before there were heads."""

    name: str
    version: str
    source: str
    loaded_at: float  # unix time
    pinned: bool = False
    kind: Kind = "adapter"
    adapter: str | None = None  # name of the adapter that heads were loaded for; None: as their file says


def render_manifest(entries: Mapping[str, Entry]) -> bytes:
    """The file."""
    body = [asdict(entry) for entry in entries.values()]
    return json.dumps({"schema": SCHEMA, "sha256": _digest(body), "adapters": body}, indent=1).encode()


def parse_manifest(raw: bytes) -> dict[str, Entry]:
    """The entries by name. ValueError, KeyError or another of Python's own errors for what is no manifest."""
    manifest = json.loads(raw)
    if manifest["schema"] != SCHEMA:
        raise ValueError(f"schema {manifest['schema']}, expected {SCHEMA}")
    body = manifest["adapters"]
    if manifest["sha256"] != _digest(body):
        raise ValueError("its checksum does not match")
    entries = {item["name"]: Entry(**item) for item in body}
    unknown = {entry.kind for entry in entries.values()} - set(FILES)
    if unknown:
        raise ValueError(f"unknown kinds {sorted(unknown)}")
    return entries


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

"""What the rest of the engine is told about adapters. Standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Admission = Literal["ready", "loading", "no_room", "failed"]
Location = Literal["disk", "host", "device"]


@dataclass(frozen=True, slots=True)
class ResidencyEvents:
    """What happened since the last poll."""

    moved: tuple[str, ...] = ()  # versions whose location changed
    failed: Mapping[str, str] = field(default_factory=dict)  # version → why it cannot be loaded


@dataclass(frozen=True, slots=True)
class ResidencyStats:
    """Counts for the metrics."""

    pages_used: int = 0
    pages_total: int = 0
    lookups: int = 0
    hits: int = 0


@dataclass(frozen=True, slots=True)
class Resident:
    """One adapter or gate set, for an operator who looks."""

    version: str
    kind: Literal["adapter", "gate_set"]
    location: Location
    pages: int = 0  # of adapter memory, reserved or filled
    users: int = 0  # sequences that run with it
    is_pinned: bool = False
    is_loading: bool = False  # on its way to host memory or to the device
    error: str | None = None

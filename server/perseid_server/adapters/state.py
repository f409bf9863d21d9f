"""What the rest of the engine is told about adapters. Standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from perseid_server.errors import PerseidError, Unavailable

Admission = Literal["ready", "loading", "no_room", "failed"]
Location = Literal["disk", "host", "device"]


def why(error: BaseException) -> str:
    """What clients may be told of an error in a load. Others' words name paths and versions; the log has them."""
    if isinstance(error, PerseidError):
        return error.message
    what = error.strerror if isinstance(error, OSError) else None
    return what or f"an internal error ({type(error).__name__})"


def is_final(error: BaseException) -> bool:
    """Whether an error in a load lies in what was loaded, so that trying again would not help."""
    return isinstance(error, PerseidError) and not isinstance(error, Unavailable)


@dataclass(frozen=True, slots=True)
class ResidencyEvents:
    """What happened since the last poll."""

    moved: tuple[str, ...] = ()  # versions whose location changed
    failed: Mapping[str, str] = field(default_factory=dict)  # version → why it cannot be loaded
    passing: frozenset[str] = frozenset()  # of these, those that may be loaded when they are asked for again


@dataclass(slots=True)
class Happened:
    """The same, while it is gathered."""

    moved: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    passing: set[str] = field(default_factory=set)

    def told(self) -> ResidencyEvents:
        """For those who poll."""
        return ResidencyEvents(tuple(self.moved), self.failed, frozenset(self.passing))


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

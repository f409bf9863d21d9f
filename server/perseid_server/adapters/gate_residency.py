"""Gate sets on the device: a loader thread brings them there when they are first needed.

They are small (some MB), so those in use and those that are pinned stay, and a few of the others, least recently used
first to go. The engine's thread asks and decides; the loader builds a table and hands it over whole. A pinned set whose
load fails for a moment is tried again after a while.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from perseid_kernels.routing import GateTable
from perseid_server.adapters.backoff import Backoff
from perseid_server.adapters.state import Admission, Happened, Location, ResidencyEvents, Resident, is_final, why

logger = logging.getLogger(__name__)

MAX_IDLE = 8
MAX_IDLE_BYTES = 256 << 20
"""Tables that stay on the device though nobody uses or pins them, and what they may take together."""


@dataclass(frozen=True, slots=True)
class GateSource:
    """What a table is built from."""

    path: Path | None  # folder with the gates of the first adapters; None: there are none
    adapters: tuple[str, ...]  # versions, in the order of the columns
    folders: tuple[Path | None, ...]  # of the adapters, as far as they are registered
    null: bool


BuildTable = Callable[[GateSource], GateTable]
"""Reads and computes; runs on the loader's thread. PerseidError says why it cannot be done."""


@dataclass(slots=True)
class _GateSet:
    source: GateSource
    table: GateTable | None = None
    loading: Future[GateTable] | None = None
    load_again: bool = False  # registered while it loaded: its files may have gone and come back meanwhile
    users: int = 0
    pinned: bool = False
    forgotten: bool = False
    error: str | None = None  # that lies in its files
    trouble: str | None = None  # why the last load failed, where that may pass
    backoff: Backoff = field(default_factory=Backoff)

    def forget_failures(self) -> None:
        """It is there, or comes from the start."""
        self.error = self.trouble = None
        self.backoff.reset()


class GateResidency:
    """All calls come from the engine's thread."""

    def __init__(self, build: BuildTable, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: what pinned sets that failed to load wait on, s."""
        self._build = build
        self._clock = clock
        self._sets: OrderedDict[str, _GateSet] = OrderedDict()  # least recently used first
        self._events = Happened()
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="gate-loader")

    def register(self, version: str, source: GateSource, *, pinned: bool) -> None:
        """Make a gate set known, or revive one that was to be forgotten."""
        gates = self._sets.setdefault(version, _GateSet(source))
        gates.source = source
        gates.load_again = gates.loading is not None
        gates.forgotten = False
        gates.forget_failures()
        self.pin(version, pinned)

    def forget(self, version: str) -> None:
        """Let a gate set go with its last user."""
        gates = self._sets[version]
        gates.forgotten = True
        gates.pinned = False
        self._drop_if_forgotten(version)

    def pin(self, version: str, pinned: bool) -> None:
        """Load a gate set and keep it, or let it go when others come."""
        gates = self._sets[version]
        gates.pinned = pinned
        if pinned:
            self.prefetch(version)

    def knows(self, version: str) -> bool:
        """Whether it is registered (and not forgotten and gone)."""
        return version in self._sets

    def is_pinned(self, version: str) -> bool:
        """Whether it is pinned."""
        return self._sets[version].pinned

    def location(self, version: str) -> Location:
        """Where it is."""
        return "device" if self._sets[version].table is not None else "disk"

    def error(self, version: str) -> str | None:
        """Why it cannot be loaded, or could not when that was last tried."""
        gates = self._sets[version]
        return gates.error or gates.trouble

    def problem(self, version: str) -> str | None:
        """Why it can never be loaded."""
        return self._sets[version].error

    def residents(self) -> Iterator[Resident]:
        """All that are known, as they are now."""
        for version, one in self._sets.items():
            yield Resident(
                version,
                "gate_set",
                self.location(version),
                0,
                one.users,
                one.pinned,
                is_loading=one.loading is not None,
                error=self.error(version),
            )

    def table(self, version: str) -> GateTable:
        """The gates of an acquired set."""
        table = self._sets[version].table
        assert table is not None, "acquired gate sets are on the device"
        return table

    @property
    def is_loading(self) -> bool:
        """Whether a poll will take something over."""
        return any(gates.loading is not None for gates in self._sets.values())

    def acquire(self, version: str) -> Admission:
        """Take a reference if the set is on the device; otherwise see that it comes there."""
        gates = self._sets[version]
        if gates.error is not None:
            return "failed"
        if gates.table is None:
            self.prefetch(version)
            return "loading"
        gates.users += 1
        self._sets.move_to_end(version)
        return "ready"

    def release(self, version: str) -> None:
        """Give a reference back."""
        gates = self._sets[version]
        assert gates.users > 0, "released more often than acquired"
        gates.users -= 1
        self._drop_if_forgotten(version)

    def prefetch(self, version: str) -> None:
        """Have it loaded."""
        gates = self._sets[version]
        if gates.table is None and gates.loading is None and gates.error is None:
            gates.load_again = False
            gates.loading = self._loader.submit(self._build, gates.source)

    def poll(self) -> ResidencyEvents:
        """Take over what has been loaded, and report what happened since the last poll."""
        for version, gates in list(self._sets.items()):
            if gates.loading is not None and gates.loading.done():
                loaded, gates.loading = gates.loading, None
                self._take_over(version, gates, loaded)
                self._drop_if_forgotten(version)
            elif gates.pinned and gates.backoff.is_over(self._clock()):
                self.prefetch(version)
        self._evict()
        happened, self._events = self._events, Happened()
        return happened.told()

    @property
    def retry_in_s(self) -> float | None:
        """After how long a poll tries a pinned set again, though the loader is idle."""
        missing = [each for each in self._sets.values() if each.pinned and each.table is None and each.error is None]
        now = self._clock()
        return min((each.backoff.left_s(now) for each in missing if each.loading is None), default=None)

    def close(self) -> None:
        """End the loader thread."""
        self._loader.shutdown()

    def _take_over(self, version: str, gates: _GateSet, loaded: Future[GateTable]) -> None:
        error = loaded.exception()
        if error is None:
            gates.table = loaded.result()
            gates.forget_failures()
            self._sets.move_to_end(version)
            self._events.moved.add(version)
        elif gates.load_again:
            self.prefetch(version)
        elif not gates.forgotten:
            self._fail(version, gates, error)

    def _fail(self, version: str, gates: _GateSet, error: BaseException) -> None:
        """Those who wait are told. Unless the error is final, the next request for it tries again, or its pin does."""
        self._events.failed[version] = told = why(error)
        if is_final(error):
            gates.error = told
            return
        logger.error("loading gate set %s failed", version[:12], exc_info=error)
        gates.trouble = told
        gates.backoff.failed(self._clock())
        self._events.passing.add(version)

    def _evict(self) -> None:
        idle = [
            version
            for version, gates in self._sets.items()
            if gates.table is not None and gates.users == 0 and not gates.pinned
        ]
        taken = 0
        for place, version in enumerate(reversed(idle)):
            table = self._sets[version].table
            taken += table.nbytes if table is not None else 0
            if place >= MAX_IDLE or (place and taken > MAX_IDLE_BYTES):  # what has just come may be asked for now
                self._sets[version].table = None
                self._events.moved.add(version)

    def _drop_if_forgotten(self, version: str) -> None:
        gates = self._sets[version]
        if gates.forgotten and gates.users == 0 and gates.loading is None:
            del self._sets[version]

"""How long sequences wait for adapters that are not on the device, as the scheduler sees it."""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

MOST_WAITS = 1024
"""Versions whose last load is remembered, at most."""


@dataclass(slots=True)
class _Wait:
    since: float  # it was asked for and not there
    until: float | None = None  # it came


class LoadWaits:
    """By version: when it was first missed, and when it came."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._waits: OrderedDict[str, _Wait] = OrderedDict()

    def missed(self, version: str) -> None:
        """A sequence wants it, and it is not on the device."""
        wait = self._waits.get(version)
        if wait is None or wait.until is not None:
            self._waits[version] = _Wait(self._clock())
            self._waits.move_to_end(version)
            while len(self._waits) > MOST_WAITS:
                self._waits.popitem(last=False)

    def came(self, version: str) -> None:
        """It has come to the device."""
        wait = self._waits.get(version)
        if wait is not None and wait.until is None:
            wait.until = self._clock()

    def forget(self, version: str) -> None:
        """It has gone for good."""
        self._waits.pop(version, None)

    def waited_s(self, versions: Iterable[str], arrived: float) -> float:
        """For how long a sequence that arrived then, and has all it wants now, lacked some of it."""
        loads = [self._waits[version] for version in versions if version in self._waits]
        spans = [(load.since, load.until) for load in loads if load.until is not None and load.until > arrived]
        if not spans:
            return 0.0
        return max(until for _, until in spans) - max(arrived, min(since for since, _ in spans))

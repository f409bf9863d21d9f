"""Adapters that are to stay on the device, and when to try again for those that are not there yet."""

from collections.abc import Iterator

from perseid_server.adapters.tracked import Tracked


class Pins:
    """By version. `is_due`: something went that one of them may have waited for."""

    def __init__(self) -> None:
        self._adapters: dict[str, Tracked] = {}
        self.is_due = False

    def __iter__(self) -> Iterator[Tracked]:
        return iter(self._adapters.values())

    def add(self, adapter: Tracked) -> None:
        """It is wanted on the device from now on, whoever asks."""
        adapter.pinned = adapter.wanted = True
        self._adapters[adapter.version] = adapter

    def remove(self, adapter: Tracked) -> None:
        """It may go."""
        adapter.pinned = False
        self._adapters.pop(adapter.version, None)
        self.is_due = True

    def to_try(self, now: float) -> list[Tracked]:
        """Those that are neither on the device nor on the way there, and whose last failure is long enough ago."""
        self.is_due = False
        return [each for each in self._missing() if each.backoff.is_over(now)]

    def retry_in_s(self, now: float) -> float | None:
        """After how long some are to be tried. None: when something has gone."""
        waits = (each.backoff.left_s(now) for each in self._missing())
        return min((wait for wait in waits if wait > 0 or self.is_due), default=None)

    def _missing(self) -> Iterator[Tracked]:
        for each in self:
            if each.wanted and not (each.on_device or each.reading or each.writing or each.error is not None):
                yield each

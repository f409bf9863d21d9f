"""Adapters in host memory, ready to be copied to the device; beyond a limit the least recently used go."""

from collections import OrderedDict
from collections.abc import Callable

from perseid_server.adapters.loader import HostCopy


class HostTier:
    """Copies by version, up to `max_bytes`; one alone may be larger."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._copies: OrderedDict[str, HostCopy] = OrderedDict()  # least recently used first
        self.nbytes = 0  # held by all copies

    def get(self, version: str) -> HostCopy | None:
        """The version's copy, if it is there."""
        return self._copies.get(version)

    def used(self, version: str) -> None:
        """It goes later than the others."""
        self._copies.move_to_end(version)

    def keep(
        self, version: str, copy: HostCopy, *, is_waited_for: Callable[[str], bool], is_in_use: Callable[[str], bool]
    ) -> list[str]:
        """One more copy; versions that went for it. Those somebody waits for go last, those in use never."""
        self._copies[version] = copy
        self.nbytes += copy.nbytes
        gone = []
        for other in sorted(self._copies, key=is_waited_for):
            if self.nbytes <= self._max_bytes:
                break
            if other != version and not is_in_use(other):
                self.drop(other)
                gone.append(other)
        return gone

    def drop(self, version: str) -> None:
        """Let a copy go."""
        self.nbytes -= self._copies.pop(version).nbytes

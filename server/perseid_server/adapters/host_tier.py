"""Adapters in host memory, ready to be copied to the device; beyond a limit go those that are needed least."""

from collections import OrderedDict
from collections.abc import Callable, Iterator

from perseid_server.adapters.demand import Need
from perseid_server.adapters.loader import HostCopy


class HostTier:
    """Copies by version, up to `max_bytes`; one alone may be larger."""

    def __init__(self, max_bytes: int, need: Callable[[str], Need]) -> None:
        self._max_bytes = max_bytes
        self._need = need
        self._copies: OrderedDict[str, HostCopy] = OrderedDict()  # least recently used first
        self._coming: set[str] = set()  # being read
        self._sizes: dict[str, int] = {}  # of all that have been read, in bytes, until they are forgotten
        self._usual_size = max_bytes  # so much is kept for one that was never read
        self.nbytes = 0  # held by all copies

    def get(self, version: str) -> HostCopy | None:
        """The version's copy, if it is there."""
        return self._copies.get(version)

    def used(self, version: str) -> None:
        """It goes later than the others."""
        self._copies.move_to_end(version)

    def has_room(self, version: str) -> bool:
        """Whether a copy would stay, beside those that are there or coming and needed no less."""
        need = self._need(version)
        if not self._coming and self.nbytes + self._size(version) <= self._max_bytes:
            return True
        staying = [other for other in (*self._copies, *self._coming) if other != version and self._need(other) >= need]
        return not staying or sum(map(self._size, (version, *staying))) <= self._max_bytes

    def comes(self, version: str) -> None:
        """It is being read."""
        self._coming.add(version)

    def comes_not(self, version: str) -> None:
        """It could not be read."""
        self._coming.discard(version)

    def add(self, version: str, copy: HostCopy) -> None:
        """It has come; `make_room` says whether it stays."""
        self._coming.discard(version)
        self._copies[version] = copy
        self._sizes[version] = self._usual_size = copy.nbytes
        self.nbytes += copy.nbytes

    def make_room(self, version: str) -> list[str]:
        """Versions that went for one that has come; itself, where the others are needed no less."""
        gone: list[str] = []
        for other in list(self._in_its_way(version)):
            if self.nbytes <= self._max_bytes:
                break
            self.drop(other)
            gone.append(other)
        return gone

    def drop(self, version: str) -> None:
        """Let a copy go."""
        self.nbytes -= self._copies.pop(version).nbytes

    def forget(self, version: str) -> bool:
        """It is known no more; whether there was a copy."""
        self._sizes.pop(version, None)
        is_here = version in self._copies
        if is_here:
            self.drop(version)
        return is_here

    def _size(self, version: str) -> int:
        return self._sizes.get(version, self._usual_size)

    def _in_its_way(self, version: str) -> Iterator[str]:
        """First those that nobody needs, least recently used first. Then those that are needed less than this one, the
        newest first: the older ones' turns come sooner. Then this one, unless it is alone or needed by all means."""
        need = self._need(version)
        needs = {other: self._need(other) for other in self._copies if other != version}
        yield from (other for other, each in needs.items() if each is Need.NONE)
        for lesser in sorted(each for each in Need if Need.NONE < each < need):
            yield from (other for other in reversed(needs) if needs[other] is lesser)
        if need < Need.CLAIM and any(each > Need.NONE for each in needs.values()):
            yield version

"""What copies in host memory are needed for. Standard library only."""

from collections.abc import Iterable
from enum import IntEnum

from perseid_server.adapters.tracked import Tracked


class Need(IntEnum):
    """A copy makes room for one that is needed more."""

    NONE = 0  # it may be asked for again
    WAITING = 1  # for a request that waits for its turn
    PIN = 2  # for a pin, until it is on the device
    CLAIM = 3  # for the request whose turn it is
    WRITE = 4  # the loader copies it to the device


class Demand:
    """What those who wait need, as they last said."""

    def __init__(self) -> None:
        self.expected: frozenset[str] = frozenset()
        self.claimed: frozenset[str] = frozenset()

    def changes(self, expected: Iterable[str], claimed: Iterable[str]) -> bool:
        """Take over what they say now; whether that is something else."""
        before = self.expected, self.claimed
        self.expected, self.claimed = frozenset(expected), frozenset(claimed)
        return before != (self.expected, self.claimed)

    def need(self, adapter: Tracked) -> Need:
        """How much the adapter's copy is needed."""
        if adapter.writing:
            return Need.WRITE
        if adapter.on_device:
            return Need.NONE
        if adapter.version in self.claimed:
            return Need.CLAIM
        if adapter.pinned and adapter.wanted:
            return Need.PIN
        return Need.WAITING if adapter.version in self.expected else Need.NONE

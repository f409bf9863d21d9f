"""What clients send lies in memory until their requests have ended: so much at once on both transports, not more.

Large bodies and small ones have room of their own, so a thousand of the largest are turned away and an ordinary
request between them is not.
"""

from collections.abc import Callable
from typing import NoReturn, Self

from perseid_server.access.caller import Caller
from perseid_server.errors import QueueFull
from perseid_server.frontend.metrics.requests import RejectionReason
from perseid_server.frontend.shared_limit import SharedLimit

MAX_BODY_BYTES = 16 << 20  # of one body or message
SMALL_BYTES = 64 << 10  # what a connection buffers anyway
SMALL_TOTAL_BYTES = 64 << 20  # a full queue of them, at its usual length
LARGE_TOTAL_BYTES = 256 << 20  # sixteen of the largest
RETRY_AFTER_S = 2.0


class Held:
    """One body's part of the budget."""

    def __init__(self, budget: "BodyBudget", caller: Caller, stated: int | None) -> None:
        """`stated`: its size in bytes; None where the client does not say, which is counted as it comes."""
        self._budget = budget
        self._caller = caller
        self._lane = budget.lane(stated)
        self._num_bytes = 0
        self._take(stated or 0)

    def received(self, total: int) -> None:
        """So much of it has come. QueueFull when it is more than stated, and there is no room for that."""
        if total > self._num_bytes:
            self._take(total - self._num_bytes)

    def __enter__(self) -> Self:
        """The request runs."""
        return self

    def __exit__(self, *_: object) -> None:
        """It has ended."""
        self._lane.give_back(self._caller, self._num_bytes)

    def _take(self, amount: int) -> None:
        if not amount:
            return
        if not (self._lane.fits(amount) and self._lane.is_fair(self._caller, amount)):
            self._budget.refuse(self._lane)
        self._lane.take(self._caller, amount)
        self._num_bytes += amount


class BodyBudget:
    """Bytes of bodies and messages. All methods run on one event loop."""

    def __init__(
        self,
        small_bytes: int = SMALL_TOTAL_BYTES,
        large_bytes: int = LARGE_TOTAL_BYTES,
        on_refusal: Callable[[RejectionReason], None] = lambda _: None,
    ) -> None:
        self._small = SharedLimit(small_bytes)
        self._large = SharedLimit(large_bytes)
        self._on_refusal = on_refusal

    @property
    def num_bytes(self) -> int:
        """Held now."""
        return self._small.total + self._large.total

    def hold(self, caller: Caller, stated: int | None) -> Held:
        """Room for a body, to be entered for as long as its request lasts. QueueFull when there is none."""
        return Held(self, caller, stated)

    def lane(self, stated: int | None) -> SharedLimit:
        """Where a body counts."""
        return self._small if stated is not None and stated <= SMALL_BYTES else self._large

    def refuse(self, lane: SharedLimit) -> NoReturn:
        """Raise QueueFull, and count it."""
        self.count_refusal()
        raise QueueFull(
            f"{lane.total} bytes of requests this large are held already, the limit is {lane.limit}; try again",
            retry_after_s=RETRY_AFTER_S,
        )

    def count_refusal(self) -> None:
        """A request has been refused for the sake of memory."""
        self._on_refusal("bytes")

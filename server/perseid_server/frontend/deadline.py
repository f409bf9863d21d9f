"""Until when a client waits: what is left of it, and work that ends with it."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

from perseid_server.errors import DeadlineExceeded

T = TypeVar("T")

Stage = Literal["queue", "running"]
"""Before the request's first token, after it."""

_ROUNDED_UP = 0.01  # of a timeout: gRPC sends it with two or three digits, and its client gives up by what it had
_JITTER_S = 0.005  # of the ways to here: the end of a call may take a shorter time than its beginning took


@dataclass(frozen=True, slots=True)
class Timeouts:
    """What an operator sets, in seconds. None: no limit."""

    default_s: float | None = None  # of requests that state none
    longest_s: float | None = None  # longer ones are shortened to it, and requests without one get it

    def of(self, stated_s: float | None) -> float | None:
        """What holds for a request."""
        chosen = self.default_s if stated_s is None else stated_s
        known = [limit for limit in (chosen, self.longest_s) if limit is not None]
        return min(known, default=None)


class Deadline:
    """Of one request. `on_exceeded` is told the stage, once."""

    def __init__(
        self, arrived: float, timeout_s: float | None, on_exceeded: Callable[[Stage], None] = lambda _: None
    ) -> None:
        """`arrived`: on the machine's monotonic clock, s."""
        self.at = None if timeout_s is None else arrived + timeout_s
        self._timeout_s = timeout_s
        self._on_exceeded = on_exceeded
        self._stage: Stage = "queue"
        self._told = False

    @classmethod
    def none(cls) -> "Deadline":
        """Of requests that have all the time there is."""
        return cls(0.0, None)

    @property
    def is_over(self) -> bool:
        """Whether the time is over; also so nearly that a client that leaves now leaves because of it."""
        if self.at is None or self._timeout_s is None:
            return False
        return time.monotonic() >= self.at - _ROUNDED_UP * self._timeout_s - _JITTER_S

    @contextlib.contextmanager
    def minded(self) -> Iterator[None]:
        """The request runs inside. A client has the same clock, and may leave before we tell it that its time is over:
        that counts as exceeded too."""
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            if self.is_over:
                self._tell()
            raise

    async def within(self, work: Awaitable[T]) -> T:
        """What the work brings. DeadlineExceeded, and the work is cancelled, when the time is over before."""
        if self.at is None:
            return await work
        try:
            async with asyncio.timeout(self.at - time.monotonic()) as scope:
                return await work
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise self._exceeded() from error
        except DeadlineExceeded as error:  # the engine was first
            raise self._exceeded() from error

    async def guard(self, stream: AsyncGenerator[T]) -> AsyncGenerator[T]:
        """The items of a stream for as long as there is time."""
        async with contextlib.aclosing(stream):
            while True:
                try:
                    item = await self.within(anext(stream))
                except StopAsyncIteration:
                    return
                self._stage = "running"
                yield item

    def _exceeded(self) -> DeadlineExceeded:
        self._tell()
        where = "before its first token" if self._stage == "queue" else "while it ran"
        return DeadlineExceeded(f"timeout: the request's {self._timeout_s:g} s were over {where}", field="timeout")

    def _tell(self) -> None:
        if not self._told:
            self._told = True
            self._on_exceeded(self._stage)

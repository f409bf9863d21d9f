"""What has happened so far: what live progress shows, and what a stop on errors goes by."""

import asyncio
from collections import Counter, deque
from dataclasses import dataclass, field

from perseid_loadtest.traffic.record import RequestRecord

INTERRUPTED = "interrupted by the user"
WINDOW = 100
LEAST_ENDED = 20
"""Fewer requests say nothing of a share."""


@dataclass(slots=True)
class Tally:
    """Counts of one run; the latest requests by themselves."""

    sent: int = 0
    ended: int = 0
    output_tokens: int = 0
    done_sending: bool = False  # of an open loop: nothing more is due, or it gave up
    errors: Counter[str] = field(default_factory=Counter)
    recent: deque[RequestRecord] = field(default_factory=lambda: deque(maxlen=WINDOW))

    @property
    def running(self) -> int:
        """Sent and not ended."""
        return self.sent - self.ended

    @property
    def error_share(self) -> float:
        """Of the latest requests; 0 while there are too few."""
        if len(self.recent) < LEAST_ENDED:
            return 0.0
        return sum(record.error is not None for record in self.recent) / len(self.recent)

    def add(self, record: RequestRecord) -> None:
        """A request has ended."""
        self.ended += 1
        self.output_tokens += record.output_tokens
        self.recent.append(record)
        if record.error is not None:
            self.errors[record.error] += 1


class Stop:
    """Ends a run early, once, with a reason."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.reason: str | None = None

    def set(self, reason: str) -> None:
        """The first reason counts."""
        if self.reason is None:
            self.reason = reason
            self._event.set()

    async def wait(self) -> None:
        """Until somebody stops the run."""
        await self._event.wait()

"""A server inside the test: answers come when and as the test says."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from perseid_loadtest.traffic.lengths import Between
from perseid_loadtest.traffic.plan import Plan, Request
from perseid_loadtest.traffic.popularity import RoundRobin
from perseid_loadtest.traffic.prompts import RandomPrompts
from perseid_loadtest.traffic.target import Answer, Failed


class FakeTarget:
    """`behave` is asked for each request, before its tokens come."""

    address = "fake"
    streams = True
    stops_at_eos = False
    names: Sequence[str] = ()

    def __init__(self, behave: Callable[[Request], Awaitable[None]] | None = None) -> None:
        self._behave = behave
        self.asked: list[Request] = []
        self.now_running = self.most_running = 0
        self.changes: list[tuple[str, ...]] = []
        self.refuses_changes = False

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def vocabulary(self) -> Sequence[int] | None:
        return None

    async def ask(self, request: Request, answer: Answer) -> None:
        self.asked.append(request)
        self.now_running += 1
        self.most_running = max(self.most_running, self.now_running)
        try:
            if self._behave is not None:
                await self._behave(request)
            answer.arrivals.append((answer.now(), request.output_tokens))
            answer.output_tokens = request.output_tokens
        finally:
            self.now_running -= 1

    async def load(self, name: str, source: str, *, replace: bool) -> None:
        await self._change("replace" if replace else "load", name, source)

    async def unload(self, name: str) -> None:
        await self._change("unload", name)

    async def _change(self, *change: str) -> None:
        if self.refuses_changes:
            raise Failed("409", "no")
        self.changes.append(change)


def plan(arrivals=None, names: tuple[str, ...] = ("",)) -> Plan:
    """Small requests."""
    return Plan(1, RoundRobin(names), RandomPrompts(Between(4, 4), range(100)), Between(2, 2), arrivals)


async def until(moment: float) -> None:
    """Sleep until a moment of the process clock."""
    await asyncio.sleep(max(0.0, moment - time.perf_counter()))

"""A name that changes its meaning all the time, and those who ask it."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tests.chaos.admin import OK, TRANSPORTS, Admin, Told
from tests.chaos.asking import Answer, Ask, clients_of
from tests.chaos.sites import Site
from tests.e2e.running import RunningServer

NAME = "passing"
_BETWEEN_LOADS_S = 0.2


@dataclass
class Churn:
    """What has been done."""

    num_loads: int = 0
    num_complete: int = 0


@asynccontextmanager
async def churning(server: RunningServer, site: Site) -> AsyncIterator[Churn]:
    """Load one adapter in place of the other, and ask: each answer is wholly that of one of them. Loads come off
    whether or not there is an engine."""
    churn, stopping, asked = Churn(), asyncio.Event(), Admin(server.http, server.grpc)
    asks = [Ask(transport, True, NAME, site.prompts[0], site.max_tokens) for transport in TRANSPORTS]

    async def load(number: int) -> None:
        transport, folder = TRANSPORTS[number // 2 % 2], site.passing[number % 2]
        assert await asyncio.to_thread(asked.load, transport, NAME, folder) == Told(OK)
        churn.num_loads += 1

    async def load_on() -> None:
        for number in itertools.count():
            await load(number)
            await asyncio.sleep(_BETWEEN_LOADS_S)
            if stopping.is_set():
                return

    async def ask_on(alone: list[Answer]) -> None:
        for ask in itertools.cycle(asks):
            answer = await clients.ask(ask)
            if answer.kind == "complete":
                assert answer.text in {one.text for one in alone}, ask
                churn.num_complete += 1
            else:
                assert any(one.text.startswith(answer.text) for one in alone), ask
                await asyncio.sleep(_BETWEEN_LOADS_S)
            if stopping.is_set():
                return

    async with clients_of(server.http, server.grpc) as clients:
        alone = []
        for number in range(2):
            await load(number)
            alone.append(await clients.ask(asks[0]))
        assert alone[0] != alone[1]
        async with asyncio.TaskGroup() as group:
            group.create_task(load_on())
            group.create_task(ask_on(alone))
            try:
                yield churn
            finally:
                stopping.set()
        assert await asyncio.to_thread(asked.unload, "grpc", NAME) == Told(OK)

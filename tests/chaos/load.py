"""Traffic of every kind while something goes wrong, and what must be true of it afterwards."""

import asyncio
import itertools
import random
import statistics
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.chaos.asking import Answer, Ask, Clients, clients_of
from tests.chaos.sites import Site
from tests.e2e.running import RunningServer

WORKERS = 8
HANG_S = 120
_BEFORE_ASKING_AGAIN_S = 0.1


def asks_of(site: Site, seed: int = 0) -> list[Ask]:
    """Every model over both transports, streamed and whole, with every prompt; in a mixed order."""
    asks = [
        Ask(transport, stream, model, prompt, site.max_tokens)
        for transport, stream, model, prompt in itertools.product(
            ("http", "grpc"), (True, False), site.models, site.prompts
        )
    ]
    random.Random(seed).shuffle(asks)
    return asks


async def answers_alone(clients: Clients, asks: Sequence[Ask]) -> dict[tuple[str, str, int], Answer]:
    """What each question is answered with when nothing else runs: over gRPC, which tells the tokens too."""
    alone = {}
    for ask in asks:
        if ask.question not in alone:
            alone[ask.question] = await clients.ask(Ask("grpc", False, *ask.question))
            assert alone[ask.question].kind == "complete", alone[ask.question]
    return alone


@dataclass
class Load:
    """Workers that ask again and again."""

    alone: dict[tuple[str, str, int], Answer]
    num_asked: int = 0
    answers: list[tuple[Ask, Answer]] = field(default_factory=list)
    num_complete: int = 0
    served_meanwhile: list[int] = field(default_factory=list)  # of each complete one: others, from its start to its end

    async def ask(self, clients: Clients, ask: Ask) -> Answer:
        """Ask once, and note the answer."""
        self.num_asked += 1
        before = self.num_complete
        answer = await clients.ask(ask)
        self.answers.append((ask, answer))
        if answer.kind == "complete":
            self.served_meanwhile.append(self.num_complete - before)
            self.num_complete += 1
        return answer

    def median_served_meanwhile(self) -> float:
        """How many others an answer usually waits for."""
        return statistics.median(self.served_meanwhile)

    def counts(self) -> Counter[str]:
        """Answers by how they ended."""
        return Counter(answer.kind for _, answer in self.answers)

    async def completes(self, more: int) -> None:
        """Return when so many more requests have been answered to the end."""
        wanted = self.counts()["complete"] + more
        async with asyncio.timeout(HANG_S):
            while self.counts()["complete"] < wanted:  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    def check(self) -> None:
        """Each request has one answer; those that are whole are what they are alone, the others begin so, and say when
        to come again where there is a place for it."""
        assert len(self.answers) == self.num_asked
        for ask, answer in self.answers:
            alone = self.alone[ask.question]
            if answer.kind == "complete":
                assert answer.text == alone.text, ask
                assert ask.transport == "http" or answer.tokens == alone.tokens, ask
                continue
            assert alone.text.startswith(answer.text), ask
            assert answer.tokens == alone.tokens[: len(answer.tokens)], ask
            begun_stream = ask.transport == "http" and ask.stream  # its headers have gone
            assert begun_stream or (answer.retry_after_s is not None and answer.retry_after_s >= 1.0), answer


@asynccontextmanager
async def under_load(
    server: RunningServer, asks: Sequence[Ask], alone: dict[tuple[str, str, int], Answer], workers: int = WORKERS
) -> AsyncIterator[Load]:
    """Keep a server busy; at the end every request that was begun is awaited. An assertion of a worker is raised."""
    load, stopping, coming = Load(alone), asyncio.Event(), itertools.cycle(asks)

    async def work(clients: Clients) -> None:
        while not stopping.is_set():
            if (await load.ask(clients, next(coming))).kind != "complete":
                await asyncio.sleep(_BEFORE_ASKING_AGAIN_S)

    async with clients_of(server.http, server.grpc) as clients, asyncio.TaskGroup() as group:
        for _ in range(workers):
            group.create_task(work(clients))
        try:
            yield load
        finally:
            stopping.set()

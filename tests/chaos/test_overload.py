"""Ten times what the queue holds: each request is answered once, most are refused at once, and all is free after."""

import asyncio
import itertools
from collections import Counter
from pathlib import Path

import pytest

from tests.chaos.asking import Answer, Ask, clients_of
from tests.chaos.load import answers_alone, asks_of, under_load
from tests.chaos.sites import Site, running_site
from tests.fakes import expected
from tests.server.stack import make_stack, serving

QUEUE, FACTOR = 20, 10
NUM_TOKENS = 8


async def test_ten_times_too_many_requests(tmp_path: Path) -> None:
    stack = make_stack(tmp_path, max_queue=QUEUE)
    version = await stack.load("one")
    ways = itertools.cycle(itertools.product(("http", "grpc"), (True, False)))
    asks = [Ask(*next(ways), "one", f"say {number}", NUM_TOKENS) for number in range(QUEUE * FACTOR)]
    async with serving(stack) as live, clients_of(live.url, live.grpc) as clients:
        stack.engine.hold()  # the queue fills before anything ends
        asked = {asyncio.create_task(clients.ask(ask)): ask for ask in asks}
        refused, admitted = await _refused(set(asked), QUEUE * (FACTOR - 1))
        stack.engine.go_on()
        await asyncio.gather(*admitted)

        assert Counter(answer.kind for answer in refused) == {"refused": QUEUE * (FACTOR - 1)}
        assert all(1.0 <= answer.retry_after_s <= 60.0 for answer in refused)
        for task in admitted:
            alone = bytes(expected(tuple(asked[task].prompt.encode()), version, NUM_TOKENS)).decode()
            assert (task.result().kind, task.result().text) == ("complete", alone)
        assert (await clients.ask(asks[0])).kind == "complete"
    assert len(stack.engine.submitted) == QUEUE + 1
    assert not stack.registry.leases.versions()
    assert (stack.service._admission.in_progress, stack.service._admission.tokens_in_progress) == (0, 0)
    assert stack.engine.engine.stats().kv_blocks_used == 0
    assert not stack.engine.engine.has_work


async def _refused(waiting: set[asyncio.Task[Answer]], count: int) -> tuple[list[Answer], set[asyncio.Task[Answer]]]:
    """Answers of those refused while all others still run, and those others."""
    refused: list[Answer] = []
    async with asyncio.timeout(60):
        while len(refused) < count:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            refused += [task.result() for task in done]
    return refused, waiting


@pytest.mark.chaos
async def test_clients_that_come_back_at_once_ten_times_too_many(site: Site, tmp_path: Path) -> None:
    """Who is let in waits for those who were in before, not for all who knock: how many are served meanwhile follows
    from the queue. Where everybody is let in, it is as many as there are clients."""
    queue = 6
    asks = asks_of(site)
    with running_site(site, tmp_path / "store", "--max-queue", str(queue)) as server:
        async with clients_of(server.http, server.grpc) as clients:
            alone = await answers_alone(clients, asks)
        async with under_load(server, asks, alone, workers=queue * FACTOR) as load:
            await load.completes(10 * site.num_faults)
        load.check()
        counts = load.counts()
        print(f"{dict(counts)} served while one waited: {load.median_served_meanwhile()}")
        assert set(counts) == {"complete", "refused"}
        assert counts["refused"] > counts["complete"], "it was not too much: the test proves nothing"
        assert load.median_served_meanwhile() <= queue * FACTOR / 2
        assert server.metric("perseid_engine_restarts_total") == 0

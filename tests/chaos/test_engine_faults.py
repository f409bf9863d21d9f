"""The engine is killed, or stopped, under load: each request has one answer, and nothing is left behind."""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import httpx

from tests.chaos.asking import Clients, clients_of
from tests.chaos.churn import churning
from tests.chaos.load import HANG_S, answers_alone, asks_of, under_load
from tests.chaos.processes import descriptors_of, num_children
from tests.chaos.scraping import Scrapes, scraping
from tests.chaos.sites import Site, running_site
from tests.e2e.running import RunningServer

MAX_QUEUE = 24


async def test_an_engine_killed_or_stopped_at_any_moment(site: Site, tmp_path: Path) -> None:
    moments, store = random.Random(7), tmp_path / "store"
    patience = ("--step-timeout", f"{site.step_timeout_s:g}")
    with running_site(site, store, "--max-queue", str(MAX_QUEUE), *patience) as server:
        asks = asks_of(site)
        async with clients_of(server.http, server.grpc) as clients:
            alone = await answers_alone(clients, asks)
        before = descriptors_of(server)
        async with (
            scraping(server.http) as scrapes,
            churning(server, site) as churn,
            under_load(server, asks, alone) as load,
        ):
            for number in range(site.num_faults):
                await load.completes(moments.randrange(1, 8))
                await asyncio.sleep(moments.uniform(0, 0.1))  # the moment is the point: nothing to wait for
                await (_stop if number % 4 == 1 else _kill)(server, moments)
            await load.completes(len(site.models) * 2)

        load.check()
        causes = _causes(scrapes)
        print(f"{dict(load.counts())} {churn} scrapes={scrapes.count} restarts={dict(causes)}")
        assert load.counts()["unavailable"] > 0, "the faults met no request: the test proves nothing"
        assert churn.num_complete > 0
        assert not [line for line in server.lines if "Traceback" in line], "a bug on the way"
        assert scrapes.seen_up == {0.0, 1.0}, "no scrape fell into a restart: the test proves nothing"
        assert causes["stopped"] == len(range(1, site.num_faults, 4))
        assert sum(causes.values()) >= site.num_faults
        assert set(causes) <= {"signal", "stopped"}, causes
        await _becomes(lambda: descriptors_of(server) <= before + 1)  # gRPC keeps one more at times
        await _is_as_before(server, site, store)


async def _kill(server: RunningServer, moments: random.Random) -> None:
    """Now; every fourth time also the one that starts in its place, somewhere in its start."""
    pid = await _engine(server)
    os.kill(pid, signal.SIGKILL)
    if moments.random() < 0.25:
        successor = await _engine(server, other_than=pid)
        await asyncio.sleep(moments.uniform(0, 0.3))
        with contextlib.suppress(ProcessLookupError):
            os.kill(successor, signal.SIGKILL)


async def _stop(server: RunningServer, _: random.Random) -> None:
    """One that serves: a start has thirty times as long. And wait for the one that takes its place."""
    await _becomes(server.is_ready)
    pid = await _engine(server)
    os.kill(pid, signal.SIGSTOP)
    await _engine(server, other_than=pid)


async def _engine(server: RunningServer, other_than: int = 0) -> int:
    async with asyncio.timeout(HANG_S):
        while True:
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                if (pid := server.engine_pid()) != other_than:
                    return pid
            await asyncio.sleep(0.01)


def _causes(scrapes: Scrapes) -> Counter[str]:
    return Counter(
        {
            dict(labels)["cause"]: int(value)
            for (name, labels), value in scrapes.values.items()
            if name == "perseid_engine_restarts_total" and value
        }
    )


async def _becomes(condition) -> None:
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        await asyncio.sleep(0.02)


async def _is_as_before(server: RunningServer, site: Site, store: Path) -> None:
    """Everything is loaded still, nothing runs, the whole queue is free, and nobody holds on to an adapter."""
    await _becomes(server.is_ready)
    assert num_children(server) == 1
    async with clients_of(server.http, server.grpc) as clients:
        for name in ("perseid_num_requests_running", "perseid_num_requests_waiting", "perseid_kv_cache_usage_perc"):
            await _becomes(lambda name=name: server.metric(name) == 0)
        models = (await clients.http.get("/v1/models")).json()["data"]
        assert set(site.adapters) <= {model["id"] for model in models}
        await _fills_the_queue(clients, site)
        await _unloads(clients.http, site.adapters[0], store)


async def _fills_the_queue(clients: Clients, site: Site) -> None:
    asks = asks_of(site)[:MAX_QUEUE]
    answers = await asyncio.gather(*(clients.ask(ask) for ask in asks))
    assert Counter(answer.kind for answer in answers) == {"complete": MAX_QUEUE}, "places in the queue are lost"


async def _unloads(http: httpx.AsyncClient, name: str, store: Path) -> None:
    """A version that a request of before still held would stay."""
    before = len(list((store / "versions").iterdir()))
    assert (await http.post("/v1/unload_lora_adapter", json={"lora_name": name})).status_code == 200
    await _becomes(lambda: len(list((store / "versions").iterdir())) == before - 1)

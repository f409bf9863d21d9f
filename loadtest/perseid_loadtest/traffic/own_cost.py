"""What the load generator itself can do on this machine: its own cost, without a server's."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvloop
from rich.console import Console

from perseid_loadtest.traffic.driver import Limits
from perseid_loadtest.traffic.http_target import HttpTarget
from perseid_loadtest.traffic.lengths import Between
from perseid_loadtest.traffic.plan import Plan
from perseid_loadtest.traffic.popularity import RoundRobin
from perseid_loadtest.traffic.prompts import RandomPrompts
from perseid_loadtest.traffic.session import Session
from perseid_loadtest.traffic.tally import Stop

STREAMS = 64
ANSWER_TOKENS = 256
PACED_S = 0.0125
"""Between the chunks of a stream: 64 streams bring 5,120 chunks a second."""
SECONDS = 8.0
WARM_UP_S = 1.0
WANTED = 5000.0


@dataclass(frozen=True, slots=True)
class OwnCost:
    """What came in a second, and what it cost."""

    chunks_per_s: float
    busy: float  # share of its core

    @property
    def seconds_per_chunk(self) -> float:
        """Of the client's core: reading, parsing, and a share of sending requests."""
        return self.busy / self.chunks_per_s


def measure(console: Console) -> int:
    """Print both figures; exit status 1 where fewer than 5,000 chunks a second can be read."""
    most = own_cost(0.0)
    paced = own_cost(PACED_S)
    console.print(f"as fast as it can: {most.chunks_per_s:,.0f} chunks a second, {most.busy:.0%} of a core")
    console.print(
        f"each chunk by itself: {paced.chunks_per_s:,.0f} chunks a second, {paced.busy:.0%} of a core, "
        f"{1e6 * paced.seconds_per_chunk:.0f} µs a chunk"
    )
    return 0 if most.chunks_per_s >= WANTED else 1


def own_cost(tick_s: float, seconds: float = SECONDS) -> OwnCost:
    """Read 64 streams of a fake server with so many seconds between the chunks of each."""
    with fake_server(tick_s) as url:
        return uvloop.run(_read(url, seconds))


async def _read(url: str, seconds: float) -> OwnCost:
    plan = Plan(
        0, RoundRobin(("",)), RandomPrompts(Between(64, 64), range(1000, 20000)), Between(ANSWER_TOKENS, ANSWER_TOKENS)
    )
    target = HttpTarget(url)
    try:
        await target.open()
        limits = Limits(warm_up_s=WARM_UP_S, duration_s=seconds, concurrency=STREAMS)
        run = await Session(target).run(plan, limits, Stop())
    finally:
        await target.close()
    end = WARM_UP_S + seconds
    arrivals = (arrival for record in run.records for arrival in record.arrivals)
    chunks = sum(arrival.tokens for arrival in arrivals if WARM_UP_S <= arrival.moment < end)  # a token is a chunk
    return OwnCost(chunks / seconds, run.client_busy)


@contextmanager
def fake_server(tick_s: float) -> Iterator[str]:
    """Its URL, for the length of a `with` block."""
    command = [sys.executable, "-m", "perseid_loadtest.traffic.fake_server", str(tick_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()

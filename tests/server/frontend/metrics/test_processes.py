"""Memory of both processes, and how late the event loop is."""

import asyncio
import os
import time
from pathlib import Path

from perseid_server import __version__
from perseid_server.frontend.metrics import Metrics
from perseid_server.frontend.metrics.processes import resident_bytes
from tests.server.frontend.metrics.test_metrics import samples


def test_memory_is_told_of_processes_that_run() -> None:
    metrics, engine = Metrics(8), [os.getppid()]
    metrics.watch_processes(lambda: engine[0])
    told = samples(metrics)
    assert told['process_resident_memory_bytes{process="api"}'] > 1 << 20
    assert told['process_resident_memory_bytes{process="engine"}'] > 1 << 16
    engine[0] = None
    assert 'process_resident_memory_bytes{process="engine"}' not in samples(metrics)


def test_memory_is_that_of_the_kernel() -> None:
    with Path("/proc/self/status").open() as status:
        kilobytes = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
    told = resident_bytes(os.getpid())
    assert told is not None
    assert abs(told - kilobytes * 1024) < 64 << 20
    assert resident_bytes(2**31 - 1) is resident_bytes(None) is None


async def test_a_loop_that_is_held_up_is_seen_to_be_late() -> None:
    metrics = Metrics(8)
    async with metrics.measuring_lag():
        await asyncio.sleep(0)
        time.sleep(0.6)  # noqa: ASYNC251  what is measured
        await asyncio.sleep(0.05)
    told = samples(metrics)
    assert told["event_loop_lag_seconds_count"] == 1
    assert told["event_loop_lag_seconds_sum"] > 0.25


def test_what_runs_is_told() -> None:
    told = samples(Metrics(8))
    assert any(name.startswith("build_info{") and f'version="{__version__}"' in name for name in told)

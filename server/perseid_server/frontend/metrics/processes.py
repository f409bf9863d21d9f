"""The two processes: what is built in, how much memory they take, how late the API's event loop is."""

import asyncio
import platform
import resource
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from perseid_server import __version__
from perseid_server.frontend.background import Background
from perseid_server.frontend.metrics.families import Families

_LAG_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_LAG_EVERY_S = 0.25

Pid = Callable[[], int | None]
"""The id of a process that may be another one at each scrape, or none."""


class ProcessMetrics:
    """Told at each scrape, but for the lag, which is measured all the time."""

    def __init__(self, families: Families) -> None:
        self._registry = families.registry
        families.gauge("build_info", "What runs here; always 1.", ("version", "python_version")).labels(
            __version__, platform.python_version()
        ).set(1)
        self.lag = families.histogram(
            "event_loop_lag_seconds",
            "How late the API's event loop runs what is due, asked four times a second.",
            _LAG_S,
        )

    def watch_memory(self, pids: Mapping[str, Pid]) -> None:
        """Tell the memory of these processes, by name."""
        _ResidentMemory(self._registry, pids)

    @asynccontextmanager
    async def measuring_lag(self) -> AsyncGenerator[None]:
        """Measure the running loop's lag meanwhile."""
        task = Background().start(_measure_lag(self.lag))
        try:
            yield
        finally:
            task.cancel()


async def _measure_lag(lag: Histogram) -> None:
    while True:
        due = time.perf_counter() + _LAG_EVERY_S
        await asyncio.sleep(_LAG_EVERY_S)
        lag.observe(max(time.perf_counter() - due, 0.0))


class _ResidentMemory(Collector):
    """Reads /proc. A process that has ended has no sample, and neither has any where there is no /proc."""

    def __init__(self, registry: CollectorRegistry, pids: Mapping[str, Pid]) -> None:
        self._pids = pids
        registry.register(self)

    def describe(self) -> Iterator[Metric]:
        """Its name, without reading."""
        yield self._family()

    def collect(self) -> Iterator[Metric]:
        """The memory of those that run now."""
        family = self._family()
        for name, pid in self._pids.items():
            num_bytes = resident_bytes(pid())
            if num_bytes is not None:
                family.add_metric([name], num_bytes)
        yield family

    @staticmethod
    def _family() -> GaugeMetricFamily:
        return GaugeMetricFamily(
            "perseid_process_resident_memory_bytes", "Resident memory of the process.", labels=["process"]
        )


def resident_bytes(pid: int | None) -> int | None:
    """Resident memory of a process, bytes; None when there is no such process, or no way to tell."""
    if pid is None:
        return None
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return None
    return int(fields[1]) * resource.getpagesize()

"""Adapters: who runs and waits, where they are, how loading goes. vLLM has no metrics of residency."""

import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from perseid_server.engine.messages import EngineReady, EngineStats
from perseid_server.frontend.metrics.adapter_labels import MAX_ADAPTER_LABELS
from perseid_server.frontend.metrics.families import LATENCY_S, Families

LOCATIONS = ("disk", "host", "device")
_PAGE_RANK = "16"


class AdapterMetrics:
    """Residency and loads. `max_adapters`: most that can be on the device together."""

    def __init__(self, families: Families, max_adapters: int) -> None:
        self._max_adapters = str(max_adapters)
        self._registry = families.registry
        gauge, counter = families.gauge, families.counter
        self.requests = gauge(
            "lora_requests_info",
            "Adapters of running and waiting requests. The value is the unix time of the last change.",
            ("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        self.cache_info = gauge(
            "lora_cache_info", "Size of the adapter pool on the device; always 1.", ("num_pages", "page_rank")
        )
        self.cache_usage = gauge("lora_cache_usage_ratio", "Share of adapter pages in use, 0 to 1.")
        self.lookups = counter("lora_cache_lookups", "Admissions of requests that name an adapter.")
        self.hits = counter("lora_cache_hits", "Of those, with the adapter on the device already.")
        self.loads = counter("adapter_loads", "Adapters loaded or refused.", "outcome", ("loaded", "refused"))
        self.load_time = families.histogram(
            "adapter_load_seconds", "From the call that loads an adapter until it is served, those refused left out.",
            LATENCY_S,
        )  # fmt: skip

    def ready(self, ready: EngineReady) -> None:
        """A new engine serves."""
        self.cache_info.clear()
        self.cache_info.labels(str(ready.adapter_pages_total), _PAGE_RANK).set(1)

    def idle(self) -> None:
        """There is no engine, or a new one: its pool is empty."""
        self.cache_usage.set(0)
        self.tell_requests(EngineStats(), {})

    def stepped(self, stats: EngineStats, seen: EngineStats, names: Mapping[str, str]) -> None:
        """Take over a step. `seen`: the stats before; `names`: adapter version → name."""
        self.cache_usage.set(stats.adapter_pages_used / max(stats.adapter_pages_total, 1))
        self.lookups.inc(stats.adapter_lookups - seen.adapter_lookups)
        self.hits.inc(stats.adapter_hits - seen.adapter_hits)
        if (stats.running_adapters, stats.waiting_adapters) != (seen.running_adapters, seen.waiting_adapters):
            self.tell_requests(stats, names)

    def tell_requests(self, stats: EngineStats, names: Mapping[str, str]) -> None:
        """Put the one sample of lora_requests_info in place of the one before."""

        def listed(versions: tuple[str, ...]) -> str:
            return ",".join(sorted(names.get(version, version[:12]) for version in versions)[:MAX_ADAPTER_LABELS])

        self.requests.clear()
        running, waiting = listed(stats.running_adapters), listed(stats.waiting_adapters)
        self.requests.labels(self._max_adapters, running, waiting).set(time.time())

    def load_ended(self, outcome: str, seconds: float) -> None:
        """An adapter was loaded or refused after so long."""
        self.loads.labels(outcome).inc()
        if outcome == "loaded":
            self.load_time.observe(seconds)

    def watch(self, locations: Callable[[], Mapping[str, int]]) -> None:
        """Ask at each scrape how many adapters are where."""
        _Locations(locations).register(self._registry)


class _Locations(Collector):
    """Counts the adapters once a scrape, whatever the number of places."""

    def __init__(self, locations: Callable[[], Mapping[str, int]]) -> None:
        self._locations = locations

    def register(self, registry: CollectorRegistry) -> None:
        """Be asked from now on."""
        registry.register(self)

    def describe(self) -> Iterator[Metric]:
        """Its name, without counting."""
        yield self._family()

    def collect(self) -> Iterator[Metric]:
        """Where adapters are now."""
        family, counts = self._family(), self._locations()
        for location in LOCATIONS:
            family.add_metric([location], counts.get(location, 0))
        yield family

    @staticmethod
    def _family() -> GaugeMetricFamily:
        return GaugeMetricFamily("perseid_lora_cache_num_adapters", "Adapters by where they are.", labels=["location"])

"""Makes metrics with our prefix in one registry."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from perseid_server.frontend.metrics.adapter_labels import AdapterLabels

LATENCY_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
BETWEEN_TOKENS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)

ADAPTER = ("adapter",)


class Families:
    """One registry and its adapter labels."""

    def __init__(self, registry: CollectorRegistry, labels: AdapterLabels) -> None:
        self.registry = registry
        self.labels = labels

    def gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        """A value that goes up and down."""
        return Gauge(f"perseid_{name}", text, labels, registry=self.registry)

    def counter(self, name: str, text: str, label: str | None = None, values: Iterable[str] = ()) -> Counter:
        """A count, by one label or none. `values` that are known before count from zero: what appears with its first
        event has no increase to be seen."""
        labels = () if label is None else (label,)
        counter = Counter(f"perseid_{name}", text, labels, registry=self.registry)
        for value in values:
            counter.labels(value)
        return counter

    def histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        """A distribution; a bucket counts what is at most its bound."""
        return Histogram(f"perseid_{name}", text, buckets=buckets, registry=self.registry)

    def adapter_counter(self, name: str, text: str) -> Counter:
        """A count by adapter; its series come and go with the adapters' labels."""
        counter = Counter(f"perseid_{name}", text, ADAPTER, registry=self.registry)
        self.labels.follow(counter)
        return counter

    def adapter_gauge(self, name: str, text: str) -> Gauge:
        """A value by adapter; its series come and go with the adapters' labels."""
        gauge = Gauge(f"perseid_{name}", text, ADAPTER, registry=self.registry)
        self.labels.follow(gauge)
        return gauge

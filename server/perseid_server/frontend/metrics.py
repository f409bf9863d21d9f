"""Prometheus metrics. Names and meanings are vLLM's, with our prefix, so that dashboards carry over.

What gates choose (MeteoRA's routing, which vLLM has not) is told by share: a routed row counts for each adapter with
the share it got of the row's gates, so the counts of one row sum to 1.
"""

import time
from collections import Counter as Tally
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Self

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from perseid_server.engine.adaptation import BASE_COLUMN
from perseid_server.engine.messages import EngineReady, EngineStats, SequenceOutput, StepOutputs
from perseid_server.errors import Unavailable
from perseid_server.frontend.speculation_metrics import SpeculationMetrics

if TYPE_CHECKING:
    from perseid_server.frontend.generation import Generation

CONTENT_TYPE = CONTENT_TYPE_LATEST
MAX_ADAPTER_LABELS = 50
"""Adapters told apart in labels; requests of all others are counted as `other`."""

_LATENCY = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_ENTROPY = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.4, 2, 3, 4, 6)  # ln 2 = 0.69 two, ln 8 = 2.1 eight equals
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self, max_adapters: int) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry()
        self._max_adapters = max_adapters
        self._seen = EngineStats()
        self._adapter_labels: set[str] = set()

        self.num_running = self._gauge("num_requests_running", "Sequences in the running batch.")
        self.num_waiting = self._gauge("num_requests_waiting", "Sequences waiting to be scheduled.")
        self.kv_usage = self._gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.")
        self.weight_bytes = self._gauge("model_weight_bytes", "Bytes the base's packed weights take on the device.")
        self.engine_up = self._gauge("engine_up", "1 while the engine process can serve.")
        self.lora_requests = self._gauge(
            "lora_requests_info",
            "Adapters of running and waiting requests. The value is the unix time of the last change.",
            ("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        self.lora_cache_info = self._gauge(
            "lora_cache_info", "Size of the adapter pool on the device; always 1.", ("num_pages", "page_rank")
        )
        self.lora_cache_usage = self._gauge("lora_cache_usage_ratio", "Share of adapter pages in use, 0 to 1.")
        self.null_share = self._gauge("gate_null_share", "The base's share of the last step's routed rows, 0 to 1.")
        self.lora_cache_adapters = self._gauge("lora_cache_num_adapters", "Adapters by where they are.", ("location",))

        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of accepted requests.")
        self.generation_tokens = self._counter("generation_tokens", "Generated tokens.")
        self.preemptions = self._counter("num_preemptions", "Sequences preempted for want of KV blocks.")
        self.cache_queries = self._counter("prefix_cache_queries", "Tokens looked up in the prefix cache.")
        self.cache_hits = self._counter("prefix_cache_hits", "Tokens found in the prefix cache.")
        self.lora_lookups = self._counter("lora_cache_lookups", "Admissions of requests that name an adapter.")
        self.lora_hits = self._counter("lora_cache_hits", "Of those, with the adapter on the device already.")
        self.success = self._counter("request_success", "Finished requests by reason.", ("finished_reason",))
        self.failures = self._counter("request_failure", "Requests that ended without an answer, by kind.", ("kind",))
        self.rejections = self._counter(
            "requests_rejected", "Requests refused for want of room, by what was full.", ("reason",)
        )
        self.deadlines = self._counter(
            "deadline_exceeded", "Requests whose time was over, by where they were.", ("stage",)
        )
        self.adapter_requests = self._counter(
            "adapter_requests",
            "Requests by adapter: a blend counts for each of its own, auto is what gates choose for token by token.",
            ("adapter",),
        )
        self.adapter_tokens = self._counter("adapter_generation_tokens", "Generated tokens by adapter.", ("adapter",))
        self.adapter_loads = self._counter("adapter_loads", "Adapters loaded or refused.", ("outcome",))
        self.routed_tokens = self._counter("routed_tokens", "Routed rows by the share adapters got.", ("adapter",))
        self.auto_requests = self._counter("auto_requests", "Requests served by auto, by who chose.", ("tier",))
        self.engine_restarts = self._counter("engine_restarts", "Engine processes started in place of one that died.")

        seconds = self._histogram
        self.ttft = seconds("time_to_first_token_seconds", "Arrival to first token.", _LATENCY)
        self.itl = seconds("inter_token_latency_seconds", "Time between two tokens of a request.", _BETWEEN_TOKENS)
        self.tpot = seconds("request_time_per_output_token_seconds", "Decode time per token.", _BETWEEN_TOKENS)
        self.e2e = seconds("e2e_request_latency_seconds", "Arrival to last token.", _LATENCY)
        self.queue_time = seconds("request_queue_time_seconds", "Arrival in the engine to first scheduling.", _LATENCY)
        self.prefill_time = seconds("request_prefill_time_seconds", "First scheduling to first token.", _LATENCY)
        self.decode_time = seconds("request_decode_time_seconds", "First token to last token.", _LATENCY)
        self.request_prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self.request_output = self._histogram("request_generation_tokens", "Generated tokens of a request.", _TOKENS)
        # vLLM calls it iteration_tokens_total; Prometheus keeps that ending for counters.
        self.iteration = self._histogram("iteration_tokens", "Rows of a step.", _ROWS)

        self.gate_entropy = self._histogram(
            "gate_entropy_nats", "Entropy of the gates, mean over a step's routed rows.", _ENTROPY
        )
        self.speculation = SpeculationMetrics(self.registry, self._label_of)

    def render(self) -> bytes:
        """The text a scrape gets."""
        return generate_latest(self.registry)

    def engine_ready(self, ready: EngineReady) -> None:
        """A new engine serves; its counters begin at zero, and nothing runs."""
        self._seen = EngineStats()
        self.speculation.engine_ready()
        self.engine_stepped(StepOutputs(), {})
        self._tell_adapters(EngineStats(), {})
        self.weight_bytes.set(ready.weight_bytes)
        self.lora_cache_info.labels(str(ready.adapter_pages_total), "16").set(1)

    def engine_stepped(self, step: StepOutputs, names: Mapping[str, str]) -> None:
        """Take over an engine's gauges, and its counters as increments. `names`: adapter version → name."""
        stats, seen = step.stats, self._seen
        self._seen = stats
        self.num_running.set(stats.num_running)
        self.num_waiting.set(stats.num_waiting)
        self.kv_usage.set(stats.kv_blocks_used / max(stats.kv_blocks_total, 1))
        self.lora_cache_usage.set(stats.adapter_pages_used / max(stats.adapter_pages_total, 1))
        self.preemptions.inc(stats.num_preemptions - seen.num_preemptions)
        self.cache_queries.inc(stats.prefix_cache_queries - seen.prefix_cache_queries)
        self.cache_hits.inc(stats.prefix_cache_hits - seen.prefix_cache_hits)
        self.lora_lookups.inc(stats.adapter_lookups - seen.adapter_lookups)
        self.lora_hits.inc(stats.adapter_hits - seen.adapter_hits)
        self._count_routed(stats, seen, names)
        self.speculation.engine_stepped(stats, names)
        if step.iteration_tokens:
            self.iteration.observe(step.iteration_tokens)
        if (stats.running_adapters, stats.waiting_adapters) != (seen.running_adapters, seen.waiting_adapters):
            self._tell_adapters(stats, names)

    def watch_adapters(self, count: Callable[[], Tally[str]]) -> None:
        """Ask at each scrape how many adapters are where."""
        for location in ("disk", "host", "device"):
            self.lora_cache_adapters.labels(location).set_function(partial(_count_at, count, location))

    def rejected(self, reason: str) -> None:
        """A request was refused before it began."""
        self.rejections.labels(reason).inc()

    def deadline_exceeded(self, stage: str) -> None:
        """A request's time was over while it waited in the queue, or while it ran."""
        self.deadlines.labels(stage).inc()

    def adapter_load_ended(self, outcome: str) -> None:
        """An adapter was loaded or refused."""
        self.adapter_loads.labels(outcome).inc()

    def adapter_label(self, name: str) -> str:
        """The label of an adapter: its name for the first that come, `other` beyond."""
        if name not in self._adapter_labels and len(self._adapter_labels) >= MAX_ADAPTER_LABELS:
            return "other"
        self._adapter_labels.add(name)
        return name

    def time_request(self, generation: "Generation") -> "RequestTimer":
        """Follow one choice of a request."""
        return RequestTimer(self, generation)

    def _count_routed(self, stats: EngineStats, seen: EngineStats, names: Mapping[str, str]) -> None:
        before = dict(seen.routed_tokens)
        told = {version: share - before.get(version, 0.0) for version, share in stats.routed_tokens}
        fresh = {version: share for version, share in told.items() if share > 0.0}
        num_rows = sum(fresh.values())  # a row's shares sum to 1
        if num_rows <= 0.0:
            return
        for version, share in fresh.items():
            label = "base" if version == BASE_COLUMN else self._label_of(version, names)
            self.routed_tokens.labels(label).inc(share)
        self.null_share.set(fresh.get(BASE_COLUMN, 0.0) / num_rows)
        self.gate_entropy.observe((stats.gate_entropy - seen.gate_entropy) / num_rows)

    def _label_of(self, version: str, names: Mapping[str, str]) -> str:
        """A version that has lost its name takes no place among the labels."""
        return self.adapter_label(names[version]) if version in names else "other"

    def _tell_adapters(self, stats: EngineStats, names: Mapping[str, str]) -> None:
        def listed(versions: tuple[str, ...]) -> str:
            return ",".join(sorted(names.get(version, version[:12]) for version in versions)[:MAX_ADAPTER_LABELS])

        self.lora_requests.clear()
        running, waiting = listed(stats.running_adapters), listed(stats.waiting_adapters)
        self.lora_requests.labels(str(self._max_adapters), running, waiting).set(time.time())

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(f"perseid_{name}", text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"perseid_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"perseid_{name}", text, buckets=buckets, registry=self.registry)


class RequestTimer:
    """The times of one choice, counted when it ends."""

    def __init__(self, metrics: Metrics, generation: "Generation") -> None:
        self._metrics = metrics
        self._started = time.perf_counter()
        self._first: float | None = None
        self._last = self._started
        self._num_tokens = 0
        self._num_prompt = len(generation.prompt_token_ids)
        self._adapters = [metrics.adapter_label(name) for name in _labels(generation)]
        self._finished = False
        self.has_echoed = False
        metrics.prompt_tokens.inc(self._num_prompt)
        for label in self._adapters:
            metrics.adapter_requests.labels(label).inc()
        if generation.resolved.auto is not None:
            metrics.auto_requests.labels(generation.resolved.auto.tier).inc()

    def saw(self, output: SequenceOutput) -> None:
        """An output has come from the engine."""
        now = time.perf_counter()
        if self._first is None:
            self._first = now
            self._metrics.ttft.observe(now - self._started)
            self._metrics.queue_time.observe(output.queue_s or 0.0)
            self._metrics.prefill_time.observe(output.prefill_s or 0.0)
        elif output.token_ids:
            self._metrics.itl.observe(now - self._last)
        self._last = now
        self._num_tokens += len(output.token_ids)
        self._metrics.generation_tokens.inc(len(output.token_ids))

    def finish(self, reason: str) -> None:
        """The answer is complete."""
        metrics, first = self._metrics, self._first if self._first is not None else self._last
        self._finished = True
        metrics.success.labels(reason).inc()
        metrics.e2e.observe(self._last - self._started)
        metrics.decode_time.observe(self._last - first)
        metrics.request_prompt.observe(self._num_prompt)
        metrics.request_output.observe(self._num_tokens)
        for label in self._adapters:
            metrics.adapter_tokens.labels(label).inc(self._num_tokens)
        if self._num_tokens > 1:
            metrics.tpot.observe((self._last - first) / (self._num_tokens - 1))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """The request is over; without an answer it counts as a failure."""
        if not self._finished:
            self._metrics.failures.labels(_failure_kind(error)).inc()


def _labels(generation: "Generation") -> tuple[str, ...]:
    """What a request is counted for."""
    resolved = generation.resolved
    if resolved.blend:
        return tuple(adapter.name for adapter, _ in resolved.blend)
    if resolved.auto is not None and resolved.auto.tier == "token":
        return ("auto",)
    return (resolved.adapter.name if resolved.adapter else "base",)


def _count_at(count: Callable[[], Tally[str]], location: str) -> float:
    return count()[location]


def _failure_kind(error: BaseException | None) -> str:
    if isinstance(error, Unavailable):
        return "unavailable"
    return "failed" if isinstance(error, Exception) else "aborted"  # the client left: cancelled, or closed early

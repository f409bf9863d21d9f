"""The engine: what it runs, its KV cache, its life."""

from collections.abc import Callable

from perseid_server.engine.messages import EngineReady, EngineStats, StepOutputs
from perseid_server.frontend.metrics.families import Families
from perseid_server.ipc.endings import CAUSES

_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class EngineMetrics:
    """Gauges taken over from each step, and counters as increments of the engine's own."""

    def __init__(self, families: Families) -> None:
        gauge, counter = families.gauge, families.counter
        self.up = gauge("engine_up", "1 while the engine process can serve.")
        self.num_running = gauge("num_requests_running", "Sequences in the running batch.")
        self.num_waiting = gauge("num_requests_waiting", "Sequences waiting to be scheduled.")
        self.kv_usage = gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.")
        self.weight_bytes = gauge("model_weight_bytes", "Bytes the base's packed weights take on the device.")
        self.step_age = gauge("engine_step_age_seconds", "How long the running step runs already; 0 between steps.")
        self.preemptions = counter("num_preemptions", "Sequences preempted for want of KV blocks.")
        self.cache_queries = counter("prefix_cache_queries", "Tokens looked up in the prefix cache.")
        self.cache_hits = counter("prefix_cache_hits", "Tokens found in the prefix cache.")
        self.restarts = counter(
            "engine_restarts", "Engine processes started in place of one that ended, by why it did.", "cause",
            CAUSES,
        )  # fmt: skip
        # vLLM calls it iteration_tokens_total; Prometheus keeps that ending for counters.
        self.iteration = families.histogram("iteration_tokens", "Rows of a step.", _ROWS)

    def ready(self, ready: EngineReady) -> None:
        """A new engine serves."""
        self.weight_bytes.set(ready.weight_bytes)

    def idle(self) -> None:
        """There is no engine, or a new one: nothing runs."""
        for gauge in (self.num_running, self.num_waiting, self.kv_usage):
            gauge.set(0)

    def stepped(self, step: StepOutputs, seen: EngineStats) -> None:
        """Take over a step. `seen`: the stats before."""
        stats = step.stats
        self.num_running.set(stats.num_running)
        self.num_waiting.set(stats.num_waiting)
        self.kv_usage.set(stats.kv_blocks_used / max(stats.kv_blocks_total, 1))
        self.preemptions.inc(stats.num_preemptions - seen.num_preemptions)
        self.cache_queries.inc(stats.prefix_cache_queries - seen.prefix_cache_queries)
        self.cache_hits.inc(stats.prefix_cache_hits - seen.prefix_cache_hits)
        if step.iteration_tokens:
            self.iteration.observe(step.iteration_tokens)

    def watch_step_age(self, age_s: Callable[[], float]) -> None:
        """Ask at each scrape."""
        self.step_age.set_function(age_s)

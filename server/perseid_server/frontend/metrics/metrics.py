"""Prometheus metrics. Names and meanings are vLLM's, with our prefix, so that dashboards carry over."""

import os
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, disable_created_metrics, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from perseid_server.engine.messages import EngineReady, EngineStats, StepOutputs
from perseid_server.frontend.metrics.adapter_labels import AdapterLabels
from perseid_server.frontend.metrics.adapters import AdapterMetrics
from perseid_server.frontend.metrics.engine import EngineMetrics
from perseid_server.frontend.metrics.families import Families
from perseid_server.frontend.metrics.processes import Pid, ProcessMetrics
from perseid_server.frontend.metrics.requests import DeadlineStage, RejectionReason, RequestMetrics, RequestTimer
from perseid_server.frontend.metrics.routing import RoutingMetrics
from perseid_server.frontend.metrics.speculation import SpeculationMetrics

if TYPE_CHECKING:
    from perseid_server.frontend.generation import Generation

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """All metrics of one server, in a registry of their own. All methods run on one event loop."""

    def __init__(self, max_adapters: int) -> None:
        """`max_adapters`: most that can be on the device together."""
        disable_created_metrics()
        self.registry = CollectorRegistry()
        self.labels = AdapterLabels()
        families = Families(self.registry, self.labels)
        self.requests = RequestMetrics(families)
        self.engine = EngineMetrics(families)
        self.adapters = AdapterMetrics(families, max_adapters)
        self.routing = RoutingMetrics(families)
        self.speculation = SpeculationMetrics(families)
        self.processes = ProcessMetrics(families)
        self._is_ready = families.gauge("ready", "1 while the server takes requests: what GET /ready says.")
        self._seen = EngineStats()

    def render(self) -> bytes:
        """The text a scrape gets."""
        self.labels.review()
        return generate_latest(self.registry)

    # --- the engine ---------------------------------------------------------------------------------------------

    def engine_ready(self, ready: EngineReady) -> None:
        """A new engine serves; its counters begin at zero, and nothing runs."""
        self._seen = EngineStats()
        self.engine.up.set(1)
        self.engine.ready(ready)
        self.adapters.ready(ready)
        self.speculation.ready()
        self._idle()

    def engine_lost(self) -> None:
        """There is no engine that can serve: what it ran is gone."""
        self.engine.up.set(0)
        self._idle()

    def engine_restarted(self, cause: str) -> None:
        """Another engine process was started in place of one that ended for this cause, such as "stuck"."""
        self.engine.restarts.labels(cause).inc()

    def engine_stepped(self, step: StepOutputs, names: Mapping[str, str]) -> None:
        """Take over an engine's gauges, and its counters as increments. `names`: adapter version → name."""
        seen, self._seen = self._seen, step.stats
        self.engine.stepped(step, seen)
        self.adapters.stepped(step.stats, seen, names)
        self.routing.stepped(step.stats, seen, names)
        self.speculation.stepped(step.stats, names)

    def _idle(self) -> None:
        self.engine.idle()
        self.adapters.idle()
        self.speculation.idle()

    # --- requests -----------------------------------------------------------------------------------------------

    def time_request(self, generation: "Generation") -> RequestTimer:
        """Follow one choice of a request."""
        return RequestTimer(self.requests, generation)

    def rejected(self, reason: RejectionReason) -> None:
        """A request was refused before it began."""
        self.requests.rejections.labels(reason).inc()

    def deadline_exceeded(self, stage: DeadlineStage) -> None:
        """A request's time was over while it waited in the queue, or while it ran."""
        self.requests.deadlines.labels(stage).inc()

    def adapter_load_ended(self, outcome: str, seconds: float) -> None:
        """An adapter was "loaded" or "refused" after so long."""
        self.adapters.load_ended(outcome, seconds)

    # --- what is asked at each scrape ---------------------------------------------------------------------------

    def watch_adapters(self, locations: Callable[[], Mapping[str, int]], names: Callable[[], Collection[str]]) -> None:
        """How many adapters are where; which names are loaded, so that labels of others can go."""
        self.adapters.watch(locations)
        self.labels.watch(names)

    def watch_step_age(self, age_s: Callable[[], float]) -> None:
        """How long the running step runs already, seconds; 0 between steps."""
        self.engine.watch_step_age(age_s)

    def watch_ready(self, is_ready: Callable[[], bool]) -> None:
        """Whether requests are taken."""
        self._is_ready.set_function(is_ready)

    def watch_processes(self, engine_pid: Pid) -> None:
        """The memory of this process, and of the engine's."""
        self.processes.watch_memory({"api": os.getpid, "engine": engine_pid})

    def measuring_lag(self) -> AbstractAsyncContextManager[None]:
        """Measure the lag of the running event loop meanwhile."""
        return self.processes.measuring_lag()

"""Requests: how many, how they ended, and the times of each."""

from time import monotonic
from typing import TYPE_CHECKING, Literal, Self, get_args

from perseid_server.engine.messages import SequenceOutput
from perseid_server.errors import DeadlineExceeded, Unavailable
from perseid_server.frontend.metrics.adapter_labels import AUTO, BASE
from perseid_server.frontend.metrics.families import BETWEEN_TOKENS_S, LATENCY_S, TOKENS, Families

if TYPE_CHECKING:
    from perseid_server.frontend.generation import Generation

RejectionReason = Literal["queue_full", "tokens", "bytes", "rate_limit", "quota", "draining"]
DeadlineStage = Literal["queue", "running"]
FailureKind = Literal["aborted", "deadline", "failed", "unavailable"]


class RequestMetrics:
    """Counters and histograms that the frontend fills itself."""

    def __init__(self, families: Families) -> None:
        self.labels = families.labels
        counter, histogram = families.counter, families.histogram
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of accepted requests.")
        self.generation_tokens = counter("generation_tokens", "Generated tokens.")
        self.success = counter(
            "request_success", "Finished requests by reason.", "finished_reason", values=("length", "stop")
        )
        self.failures = counter(
            "request_failure", "Requests that ended without an answer, by kind.", "kind", get_args(FailureKind)
        )
        self.rejections = counter(
            "requests_rejected", "Requests refused for want of room, by what was full.", "reason",
            get_args(RejectionReason),
        )  # fmt: skip
        self.deadlines = counter(
            "deadline_exceeded", "Requests whose time was over, by where they were.", "stage", get_args(DeadlineStage)
        )
        self.auto = counter("auto_requests", "Requests served by auto, by who chose.", "tier", ("request", "token"))
        self.by_adapter = families.adapter_counter(
            "adapter_requests",
            "Requests by adapter: a blend counts for each of its own, auto is what gates choose for token by token.",
        )
        self.adapter_tokens = families.adapter_counter("adapter_generation_tokens", "Generated tokens by adapter.")

        self.ttft = histogram("time_to_first_token_seconds", "Arrival to first token.", LATENCY_S)
        self.itl = histogram("inter_token_latency_seconds", "Time between two tokens of a request.", BETWEEN_TOKENS_S)
        self.tpot = histogram("request_time_per_output_token_seconds", "Decode time per token.", BETWEEN_TOKENS_S)
        self.e2e = histogram("e2e_request_latency_seconds", "Arrival to last token.", LATENCY_S)
        self.queue_time = histogram(
            "request_queue_time_seconds", "Arrival in the engine to first scheduling.", LATENCY_S
        )
        self.prefill_time = histogram("request_prefill_time_seconds", "First scheduling to first token.", LATENCY_S)
        self.decode_time = histogram("request_decode_time_seconds", "First token to last token.", LATENCY_S)
        self.prompt_length = histogram("request_prompt_tokens", "Prompt tokens of a request.", TOKENS)
        self.output_length = histogram("request_generation_tokens", "Generated tokens of a request.", TOKENS)


class RequestTimer:
    """The times of one choice, counted when it ends."""

    def __init__(self, metrics: RequestMetrics, generation: "Generation") -> None:
        self._metrics = metrics
        self._started = generation.request.arrived
        self._first: float | None = None
        self._last = self._started
        self._num_tokens = 0
        self._num_prompt = len(generation.prompt_token_ids)
        self._deadline = generation.deadline
        self._fixed, self._adapters = _counted_for(generation)
        self._finished = False
        self.has_echoed = False
        metrics.prompt_tokens.inc(self._num_prompt)
        for label in self._labels(traffic=1.0):
            metrics.by_adapter.labels(label).inc()
        if generation.resolved.auto is not None:
            metrics.auto.labels(generation.resolved.auto.tier).inc()

    def saw(self, output: SequenceOutput) -> None:
        """An output has come from the engine."""
        now = monotonic()  # the clock of `arrived`
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
        metrics.prompt_length.observe(self._num_prompt)
        metrics.output_length.observe(self._num_tokens)
        if self._num_tokens > 1:
            metrics.tpot.observe((self._last - first) / (self._num_tokens - 1))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """The request is over; without an answer it counts as a failure. Tokens were made all the same."""
        for label in self._labels(traffic=self._num_tokens):
            self._metrics.adapter_tokens.labels(label).inc(self._num_tokens)
        if not self._finished:
            self._metrics.failures.labels(_failure_kind(error, is_late=self._deadline.is_over)).inc()

    def _labels(self, traffic: float) -> list[str]:
        """Looked up for each event: an adapter may win or lose its label while its request runs."""
        return [*self._fixed, *(self._metrics.labels.of(name, traffic) for name in self._adapters)]


def _counted_for(generation: "Generation") -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a request is counted for: fixed labels, and names of adapters."""
    resolved = generation.resolved
    if resolved.blend:
        return (), tuple(adapter.name for adapter, _ in resolved.blend)
    if resolved.auto is not None and resolved.auto.tier == "token":
        return (AUTO,), ()
    return ((), (resolved.adapter.name,)) if resolved.adapter else ((BASE,), ())


def _failure_kind(error: BaseException | None, *, is_late: bool) -> FailureKind:
    if isinstance(error, Unavailable):
        return "unavailable"
    if isinstance(error, DeadlineExceeded):
        return "deadline"
    if isinstance(error, Exception):
        return "failed"
    return "deadline" if is_late else "aborted"  # ended from outside, when the time was over or the client left

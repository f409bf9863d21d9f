"""OpenTelemetry: each sampled call as a span, with its answers' times in it. Needs the extra `tracing`.

Spans are made when a call is over, from what its record says, so that a call that runs costs nothing more. They are
sent by a thread; what a collector does not take in time is dropped.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, get_current_span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from perseid_server import __version__
from perseid_server.observe.line import shortened
from perseid_server.observe.record import AnswerRecord, CallRecord, GenerationRecord

EXPORT_TIMEOUT_S = 5.0
STOP_TIMEOUT_S = 3.0
MOST_ANSWERS = 32
"""Of one call, that have spans; a call may have thousands."""
_FAULTS = frozenset({"internal", "unavailable", "generation_failed", "deadline_exceeded"})
"""Errors that are not the client's."""

_INT64 = range(-(1 << 63), 1 << 63)

Attributes = dict[str, Any]


class Tracing:
    """Sends spans until it is stopped."""

    def __init__(self, endpoint: str, sample: float) -> None:
        """`endpoint`: of an OTLP collector, gRPC, as http(s)://HOST:PORT; `sample`: the share of calls whose client has
        not decided it (W3C traceparent)."""
        self._exporter = OTLPSpanExporter(endpoint, timeout=EXPORT_TIMEOUT_S)
        self._provider = TracerProvider(
            ParentBased(TraceIdRatioBased(sample)),
            Resource.create({"service.name": "perseid", "service.version": __version__}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("perseid_server", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def tell(self, call: CallRecord) -> Mapping[str, object]:
        """Make the spans of a call that is over; what its log line says of them."""
        if call.is_probe:
            return {}
        parent = self._propagator.extract(call.trace_headers)
        clock = _Clock()
        span = self._tracer.start_span(
            _clean(call.route), parent, SpanKind.SERVER, _attributes(call), start_time=clock.ns(call.arrived)
        )
        if span.is_recording():
            for answer in _answers(call):
                _Timeline(self._tracer, span, clock, call, answer).draw()
            if call.error in _FAULTS:
                span.set_status(StatusCode.ERROR, call.error)
        span.end(clock.ns(call.arrived + call.duration_s))
        has_parent = get_current_span(parent).get_span_context().is_valid
        known = span.is_recording() or span.get_span_context().trace_flags.sampled or has_parent
        return {"trace_id": f"{span.get_span_context().trace_id:032x}"} if known else {}

    def stop(self) -> None:
        """Send what is there, unless that takes long."""
        sending = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        sending.start()
        sending.join(STOP_TIMEOUT_S)
        if sending.is_alive():
            self._exporter.shutdown(0)


class _Clock:
    """From the monotonic clock to the wall's, ns since 1970, as both are now."""

    def __init__(self) -> None:
        self._wall_ns = time.time_ns()
        self._monotonic = time.monotonic()

    def ns(self, moment: float) -> int:
        """A moment of the past."""
        return self._wall_ns - round((self._monotonic - moment) * 1e9)


class _Timeline:
    """The spans of one answer, end to end: queue, with the load of its adapters in it, prefill, decode."""

    def __init__(self, tracer: Tracer, parent: Span, clock: _Clock, call: CallRecord, answer: AnswerRecord) -> None:
        self._tracer = tracer
        self._parent = parent
        self._clock = clock
        self._call = call
        self._answer = answer

    def draw(self) -> None:
        """All that is known of it."""
        answer = self._answer
        if answer.first is None or answer.last is None:
            self._span("unanswered", answer.submitted, self._call.arrived + self._call.duration_s)
            return
        scheduled = answer.first - answer.prefill_s
        queue = self._span("queue", scheduled - answer.queue_s, scheduled)
        if answer.load_s > 0:
            self._span("adapter load", scheduled - answer.load_s, scheduled, queue)
        self._span("prefill", scheduled, answer.first)
        self._span("decode", answer.first, answer.last, tokens=answer.num_tokens)

    def _span(self, name: str, start: float, end: float, parent: Span | None = None, **attributes: int) -> Span:
        begin, context = max(start, self._call.arrived), set_span_in_context(parent or self._parent)
        told = {f"perseid.{each}": value for each, value in attributes.items()}
        span = self._tracer.start_span(name, context, attributes=told, start_time=self._clock.ns(begin))
        span.end(self._clock.ns(max(begin, end)))
        return span


def _answers(call: CallRecord) -> Iterator[AnswerRecord]:
    for _, answer in zip(range(MOST_ANSWERS), call.answers, strict=False):
        yield answer


def _attributes(call: CallRecord) -> Attributes:
    """Names are those of OpenTelemetry's conventions where it has one."""
    told: Attributes = {
        "perseid.request_id": call.request_id,
        "perseid.tenant": call.tenant,
        "perseid.key": call.key,
        "perseid.name": call.subject,
        "error.type": call.error,
    }
    if call.transport == "http":
        method, _, route = call.route.partition(" ")
        told |= {"http.request.method": method, "http.route": route, "http.response.status_code": call.status}
    else:
        told |= {"rpc.system": "grpc", "rpc.method": call.route, "rpc.response.status_code": call.status}
    if call.generations:
        told |= _generated(call, call.generations[0])
    cleaned = ((name, _clean(value)) for name, value in told.items())
    return {name: value for name, value in cleaned if value not in (None, "", ())}


def _generated(call: CallRecord, first: GenerationRecord) -> Attributes:
    return {
        "gen_ai.provider.name": "perseid",
        "gen_ai.operation.name": first.operation,
        "gen_ai.request.model": first.model,
        "gen_ai.response.model": first.adapter or first.base,
        "gen_ai.response.id": first.id,
        "gen_ai.response.finish_reasons": call.finish_reasons,
        "gen_ai.response.time_to_first_chunk": call.ttft_s,
        "gen_ai.usage.input_tokens": call.prompt_tokens,
        "gen_ai.usage.output_tokens": call.generated_tokens,
        "gen_ai.usage.cache_read.input_tokens": sum(one.cached_tokens for one in call.generations),
        "perseid.tier": first.tier,
        **{f"gen_ai.request.{name}": value for name, value in first.settings.items()},
    }


def _clean(value: Any) -> Any:
    """Texts of clients may be long, and hold halves of characters; numbers may be large. The exporter would complain of
    each that it cannot encode."""
    if isinstance(value, int) and value not in _INT64:
        return None
    return shortened(value.encode(errors="replace").decode()) if isinstance(value, str) else value

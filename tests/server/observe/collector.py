"""An OpenTelemetry collector that keeps what it is sent."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True)
class Sent:
    """One span."""

    name: str
    id: str
    parent: str
    trace: str
    start: int  # ns
    end: int
    attributes: dict[str, Any]
    is_error: bool
    resource: dict[str, Any]


@dataclass
class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Thread-safe enough: it only appends."""

    port: int = 0
    spans: list[Sent] = field(default_factory=list)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def Export(self, request, context):
        for of_resource in request.resource_spans:
            resource = values(of_resource.resource.attributes)
            for scope in of_resource.scope_spans:
                self.spans += [sent(span, resource) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def tree(self) -> dict[str, list[str]]:
        """Names of spans → names of their children in order of time."""
        by_start = sorted(self.spans, key=lambda span: (span.start, -span.end))
        return {one.name: [each.name for each in by_start if each.parent == one.id] for one in self.spans}

    def named(self, name: str) -> Sent:
        (found,) = (span for span in self.spans if span.name == name)
        return found


def values(attributes) -> dict[str, Any]:
    def value(told):
        kind = told.WhichOneof("value")
        return [value(each) for each in told.array_value.values] if kind == "array_value" else getattr(told, kind)

    return {one.key: value(one.value) for one in attributes}


def sent(span, resource) -> Sent:
    return Sent(
        span.name, span.span_id.hex(), span.parent_span_id.hex(), span.trace_id.hex(), span.start_time_unix_nano,
        span.end_time_unix_nano, values(span.attributes), span.status.code == 2, resource,
    )  # fmt: skip


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on a free port of loopback."""
    with ThreadPoolExecutor(2) as pool:
        server, collector = grpc.server(pool), Collector()
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
        collector.port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield collector
        finally:
            server.stop(None).wait()

"""What `perseid serve` is told of traces. Without `--trace-endpoint` OpenTelemetry is not imported."""

import asyncio
import importlib
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from perseid_server.config import ServeConfig
from perseid_server.errors import InvalidRequest
from perseid_server.observe.calls import OnClose


def check_tracing(config: ServeConfig) -> None:
    """InvalidRequest, before anything is loaded, when traces are wanted and could not be sent."""
    endpoint = config.trace_endpoint
    if endpoint is None:
        return
    if not _is_address(endpoint):
        raise InvalidRequest(
            f"--trace-endpoint {endpoint}: expected the address of an OpenTelemetry collector (OTLP over gRPC), as in "
            "http://127.0.0.1:4317",
            field="trace_endpoint",
        )
    _tracing()


@asynccontextmanager
async def traced(config: ServeConfig) -> AsyncGenerator[OnClose | None]:
    """Who is told of calls that are over; None without traces. Sends the last spans in the end, which may take seconds
    and holds up nobody."""
    if config.trace_endpoint is None:
        yield None
        return
    tracing = _tracing().Tracing(config.trace_endpoint, config.trace_sample)
    try:
        yield tracing.tell
    finally:
        # A thread of its own: asyncio's may all be busy for longer than a server that ends can wait.
        thread = ThreadPoolExecutor(1)
        await asyncio.get_running_loop().run_in_executor(thread, tracing.stop)
        thread.shutdown(wait=False)


def _is_address(endpoint: str) -> bool:
    try:
        parts = urlsplit(endpoint)
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _tracing() -> Any:
    try:
        return importlib.import_module("perseid_server.observe.tracing")
    except ModuleNotFoundError as error:
        raise InvalidRequest(
            f"--trace-endpoint needs OpenTelemetry ({error.name} is not installed); install it with: pip install "
            '"perseid[tracing]"',
            field="trace_endpoint",
        ) from error

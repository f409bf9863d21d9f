"""The HTTP application: routes, limits."""

import asyncio
import inspect
import time
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perseid_server import __version__
from perseid_server.access.gate import Gate
from perseid_server.api.http import errors
from perseid_server.api.http.access import Access
from perseid_server.api.http.adapters import AdapterRoutes
from perseid_server.api.http.debug import DebugRoutes, DebugSources
from perseid_server.api.http.generate import GenerationRoutes
from perseid_server.api.http.observed import Observed
from perseid_server.api.http.operations import OperationRoutes
from perseid_server.errors import TooLarge
from perseid_server.frontend.metrics import Metrics
from perseid_server.frontend.registry import AdapterRegistry
from perseid_server.frontend.service import GenerationService
from perseid_server.observe.record import current_call

MAX_BODY_BYTES = 16 << 20
BODY_TIMEOUT_S = 20.0
SLOWEST_BODY = 16 << 10  # bytes a second that a long body must come at, after that time
_QUIET: dict[str, Any] = (
    {"telemetry": {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}}
    if "telemetry" in inspect.signature(FastAPI).parameters
    else {}
)
"""FastAPI's own telemetry, where it has one, would tell what clients write; `perseid_server.observe` does not."""
_TOO_LARGE = f"the body is larger than {MAX_BODY_BYTES} bytes"


def build_app(
    service: GenerationService,
    registry: AdapterRegistry,
    metrics: Metrics,
    debug: DebugSources,
    *,
    base: str,
    root: str,
    gate: Gate | None = None,
) -> FastAPI:
    """`debug`: what an operator may look at, also where each call is written down and whether the server is ready;
    `base`: the name the base is served under; `root`: where it came from; `gate`: who may call, None: anybody."""
    # The documentation page would load its scripts from elsewhere; the OpenAPI document is there.
    app = FastAPI(title="Perseid", version=__version__, docs_url=None, redoc_url=None, **_QUIET)
    errors.install(app)
    app.include_router(GenerationRoutes(service, base).router)
    app.include_router(AdapterRoutes(registry, service, base, root).router)
    app.include_router(OperationRoutes(service, metrics, debug.status).router)
    app.include_router(DebugRoutes(debug).router)
    app.add_middleware(Access, gate=gate or Gate())
    app.add_middleware(Limits)
    app.add_middleware(Observed, calls=debug.calls)  # the outermost: refusals are told of too
    return app


class Limits:
    """Refuses bodies that are too large, before and while they are read."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdigit() and int(length) > MAX_BODY_BYTES:
            await _refuse(send)
            return
        await self._app(scope, _counted(receive), send)


def _counted(receive: Receive) -> Receive:
    """Bodies that are too large or come too slowly end with an error. Behind the body, no time is counted."""
    total, is_complete = 0, False
    started = time.monotonic()

    async def counted() -> Message:
        nonlocal total, is_complete
        if is_complete:
            return await receive()
        try:
            async with asyncio.timeout(started + BODY_TIMEOUT_S + total / SLOWEST_BODY - time.monotonic()):
                message = await receive()
        except TimeoutError as error:
            raise HTTPException(408, "the body comes too slowly", {"Connection": "close"}) from error
        is_complete = not message.get("more_body", False)
        total += len(message.get("body", b""))
        if total > MAX_BODY_BYTES:
            raise HTTPException(413, _TOO_LARGE)
        return message

    return counted


async def _refuse(send: Any) -> None:
    error = TooLarge(_TOO_LARGE)
    current_call().failed(error)
    body = msgspec.json.encode(errors.body_of(error))
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": body})

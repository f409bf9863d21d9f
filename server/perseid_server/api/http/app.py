"""The HTTP application: routes and what lies around them."""

import re
import uuid

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perseid_server import __version__
from perseid_server.access.gate import Gate
from perseid_server.api.body_budget import BodyBudget
from perseid_server.api.http import document, errors
from perseid_server.api.http.access import Access
from perseid_server.api.http.adapters import AdapterRoutes
from perseid_server.api.http.bodies import Bodies
from perseid_server.api.http.door import Door
from perseid_server.api.http.generate import GenerationRoutes
from perseid_server.api.http.operations import OperationRoutes
from perseid_server.api.status import ServerStatus
from perseid_server.frontend.metrics import Metrics
from perseid_server.frontend.registry import AdapterRegistry
from perseid_server.frontend.service import GenerationService

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


def build_app(
    service: GenerationService,
    registry: AdapterRegistry,
    metrics: Metrics,
    status: ServerStatus,
    *,
    base: str,
    root: str,
    gate: Gate | None = None,
    budget: BodyBudget | None = None,
) -> FastAPI:
    """`base`: the name the base is served under; `root`: where it came from; `gate`: who may call, None: anybody;
    `budget`: of bodies, None: one of its own."""
    # The documentation page would load its scripts from elsewhere; the OpenAPI document is there.
    app = FastAPI(title="Perseid", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    errors.install(app)
    document.install(app)
    app.include_router(GenerationRoutes(service, base).router)
    app.include_router(AdapterRoutes(registry, service, base, root).router)
    app.include_router(OperationRoutes(service, metrics, status).router)
    app.add_middleware(Bodies, budget=budget or BodyBudget())
    app.add_middleware(Door, check=service.check_room)
    app.add_middleware(Access, gate=gate or Gate())
    app.add_middleware(RequestIds)  # the outermost: refusals have request ids too
    return app


class RequestIds:
    """Gives each request an id, and its answer too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        stated = headers.get("x-request-id", "")
        request_id = stated if _REQUEST_ID.fullmatch(stated) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def tag(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self._app(scope, receive, tag)

"""The HTTP application: routes and what lies around them."""

import inspect
from typing import Any

from fastapi import FastAPI

from perseid_server import __version__
from perseid_server.access.gate import Gate
from perseid_server.api.body_budget import BodyBudget
from perseid_server.api.http import document, errors
from perseid_server.api.http.access import Access
from perseid_server.api.http.adapters import AdapterRoutes
from perseid_server.api.http.bodies import Bodies
from perseid_server.api.http.debug import DebugRoutes, DebugSources
from perseid_server.api.http.door import Door
from perseid_server.api.http.generate import GenerationRoutes
from perseid_server.api.http.observed import Observed
from perseid_server.api.http.operations import OperationRoutes
from perseid_server.frontend.metrics import Metrics
from perseid_server.frontend.registry import AdapterRegistry
from perseid_server.frontend.service import GenerationService

_QUIET: dict[str, Any] = (
    {"telemetry": {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}}
    if "telemetry" in inspect.signature(FastAPI).parameters
    else {}
)
"""FastAPI's own telemetry, where it has one, would tell what clients write; `perseid_server.observe` does not."""


def build_app(
    service: GenerationService,
    registry: AdapterRegistry,
    metrics: Metrics,
    debug: DebugSources,
    *,
    base: str,
    root: str,
    gate: Gate | None = None,
    budget: BodyBudget | None = None,
) -> FastAPI:
    """`debug`: what an operator may look at, also where each call is written down and whether the server is ready;
    `base`: the name the base is served under; `root`: where it came from; `gate`: who may call, None: anybody;
    `budget`: of bodies, None: one of its own."""
    # The documentation page would load its scripts from elsewhere; the OpenAPI document is there.
    app = FastAPI(title="Perseid", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False, **_QUIET)
    errors.install(app)
    document.install(app)
    app.include_router(GenerationRoutes(service, base).router)
    app.include_router(AdapterRoutes(registry, service, base, root).router)
    app.include_router(OperationRoutes(service, metrics, debug.status).router)
    app.include_router(DebugRoutes(debug).router)
    app.add_middleware(Bodies, budget=budget or BodyBudget())
    app.add_middleware(Door, check=service.check_room)
    app.add_middleware(Access, gate=gate or Gate())
    app.add_middleware(Observed, calls=debug.calls)  # the outermost: refusals are told of too
    return app

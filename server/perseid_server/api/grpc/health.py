"""grpc.health.v1.Health, with what the library leaves out: List, and words for a service that is not there."""

from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2

from perseid_server.api.grpc.errors import abort
from perseid_server.errors import NotFound

_SHOWN = 200  # characters of a name


class HealthServicer(health.aio.HealthServicer):  # type: ignore[misc]  # untyped
    """Check, List and Watch."""

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> health_pb2.HealthCheckResponse:
        """Whether one service serves; the empty name is the server."""
        status = self._server_status.get(request.service)
        if status is None:
            known = ", ".join(repr(name) for name in self._server_status)
            error = NotFound(f"service {request.service[:_SHOWN]!r} is not known; expected one of {known}")
            await abort(context, error)
        return health_pb2.HealthCheckResponse(status=status)

    async def List(  # noqa: N802
        self, _: health_pb2.HealthListRequest, __: "grpc.aio.ServicerContext[Any, Any]"
    ) -> health_pb2.HealthListResponse:
        """Whether each service serves."""
        told = {name: health_pb2.HealthCheckResponse(status=status) for name, status in self._server_status.items()}
        return health_pb2.HealthListResponse(statuses=told)

"""grpc.health.v1: what GET /ready says, for the server and for each of its services.

grpcio's own servicer keeps a copy of each status and tells its watchers under a lock, so that one of them who does not
read keeps the change from all others. This one looks at the status itself; each watcher waits alone.
"""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from perseid_server.access.caller import Caller
from perseid_server.api.grpc.errors import abort
from perseid_server.api.grpc.handlers import Context
from perseid_server.api.status import ServerStatus
from perseid_server.errors import NotFound, QueueFull
from perseid_server.frontend.shared_limit import SharedLimit

MOST_WATCHES = 1024
Response = health_pb2.HealthCheckResponse
_MOST_SHOWN = 100  # characters of a service's name
_RETRY_AFTER_S = 60.0


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # untyped
    """Check, List, Watch."""

    def __init__(self, status: ServerStatus, services: Sequence[str]) -> None:
        """`services`: full names; the empty one stands for the server."""
        self._status = status
        self._services = frozenset(services) | {""}
        self.watches = SharedLimit(MOST_WATCHES)

    async def Check(self, request: Any, context: Context) -> Any:  # noqa: N802
        """The status now."""
        if request.service not in self._services:
            known = ", ".join(map(repr, sorted(self._services)))
            name = request.service[:_MOST_SHOWN]
            await abort(context, NotFound(f"service {name!r} is not known; expected one of {known}"))
        return Response(status=self._now())

    async def List(self, _: Any, __: Context) -> Any:  # noqa: N802
        """The status of each."""
        statuses = {name: Response(status=self._now()) for name in self._services}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def Watch(self, request: Any, context: Context) -> AsyncIterator[Any]:  # noqa: N802
        """The status now, and each time it changes."""
        connection = Caller(tenant=context.peer())  # no key is needed, and so there is no other tenant
        if not (self.watches.fits(1) and self.watches.is_fair(connection, 1)):
            full = f"{self.watches.total} calls watch already, as many as may; call Check instead"
            await abort(context, QueueFull(full, retry_after_s=_RETRY_AFTER_S))
        self.watches.take(connection, 1)
        try:
            is_known, told = request.service in self._services, None
            while True:
                change = self._status.next_change()
                now = self._now() if is_known else Response.SERVICE_UNKNOWN
                if now != told:
                    yield Response(status=now)
                    told = now
                await change.wait()
        finally:
            self.watches.give_back(connection, 1)

    def _now(self) -> Any:
        return Response.SERVING if self._status.is_ready else Response.NOT_SERVING

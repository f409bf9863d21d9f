"""The gRPC server: services, health, reflection, limits."""

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from perseid_protos.perseid.v1 import adapter_admin_pb2, adapter_admin_pb2_grpc, generation_pb2, generation_pb2_grpc
from perseid_server.access.gate import Gate
from perseid_server.api.body_budget import MAX_BODY_BYTES, BodyBudget
from perseid_server.api.grpc.access import Access
from perseid_server.api.grpc.adapter_admin import AdapterAdminServicer
from perseid_server.api.grpc.decoding import Decoding
from perseid_server.api.grpc.generation import GenerationServicer
from perseid_server.api.grpc.health import HealthServicer
from perseid_server.api.grpc.observed import Observed
from perseid_server.api.grpc.patience import Patience
from perseid_server.api.status import ServerStatus
from perseid_server.errors import Conflict
from perseid_server.frontend.registry import AdapterRegistry
from perseid_server.frontend.service import GenerationService
from perseid_server.observe.calls import Calls

MAX_CALLS = 1 << 14
"""At once, of all clients, those included whose answers lie here unread: some 100 KiB each."""
SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["Generation"].full_name,
    adapter_admin_pb2.DESCRIPTOR.services_by_name["AdapterAdmin"].full_name,
)
_OPTIONS = (
    ("grpc.so_reuseport", 0),  # on by default: a second server would share the port, and the requests, silently
    ("grpc.server_handshake_timeout_ms", 20_000),  # who connects and says nothing, or speaks no TLS, is let go
    ("grpc.http2.bdp_probe", 0),  # a call's first window stays at 64 KiB: what may come before its message is read
    ("grpc.max_receive_message_length", MAX_BODY_BYTES),
    ("grpc.max_send_message_length", -1),  # what has been computed is delivered; limits of requests bound it
    ("grpc.keepalive_time_ms", 60_000),  # a peer that is gone without a word is found out,
    ("grpc.keepalive_timeout_ms", 20_000),  # and what it asked for is freed
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.max_connection_idle_ms", 300_000),
    ("grpc.server.max_pending_requests", 1 << 14),  # calls that nobody has looked at; what is beyond them is cancelled
    ("grpc.server.max_pending_requests_hard_limit", 1 << 15),  # without a word, from the first number on by chance
    ("grpc.max_concurrent_streams", 1024),  # of one connection; more wait at the client
)


class GrpcServer:
    """Made, then bound, then started."""

    def __init__(
        self,
        service: GenerationService,
        registry: AdapterRegistry,
        status: ServerStatus,
        base: str,
        gate: Gate | None = None,
        credentials: grpc.ServerCredentials | None = None,
        calls: Calls | None = None,
        budget: BodyBudget | None = None,
        most_connections: int | None = None,
    ) -> None:
        """`gate`: who may call, None: anybody; `credentials`: of TLS, None: plain text; `calls`: where each call is
        written down; `budget`: of messages, None: one of its own; `most_connections`: beyond them a client is turned
        away at once."""
        connections = () if most_connections is None else (("grpc.max_allowed_incoming_connections", most_connections),)
        self.patience = Patience(budget or BodyBudget(), {SERVICES[0]: service.check_room})
        self._server = grpc.aio.server(
            interceptors=[Observed(calls or Calls()), self.patience, Access(gate or Gate()), Decoding()],
            options=(*_OPTIONS, *connections),
            maximum_concurrent_rpcs=MAX_CALLS,
        )
        self._credentials = credentials
        self.health = HealthServicer(status, SERVICES)
        generation_pb2_grpc.add_GenerationServicer_to_server(GenerationServicer(service, base), self._server)
        adapter_admin_pb2_grpc.add_AdapterAdminServicer_to_server(AdapterAdminServicer(registry), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    def bind(self, host: str, port: int) -> int:
        """Take a port, 0 for any; returns the one taken. Conflict when it is not free."""
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if self._credentials is not None:
                return self._server.add_secure_port(address, self._credentials)
            return self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise Conflict(f"gRPC cannot listen on {address}: is the port taken?", field="grpc_port") from error

    async def start(self) -> None:
        """Answer calls."""
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        """Take no more calls; cut off those that run after the grace time."""
        await self._server.stop(grace_s)

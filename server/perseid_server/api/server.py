"""Both transports on one event loop."""

import asyncio
import contextlib
import socket
from dataclasses import dataclass
from functools import partial

import uvicorn
from fastapi import FastAPI

from perseid_server.api.grpc.server import GrpcServer
from perseid_server.api.http.listener import Listener
from perseid_server.api.http.protocol import PatientProtocol
from perseid_server.api.tls import Tls
from perseid_server.errors import Conflict

LAST_WORDS_S = 2.0
KEEP_ALIVE_S = 75  # of a connection on which nothing comes after an answer
_LOOK_EVERY_S = 0.05
_SEND_BUFFER_BYTES = 256 << 10  # of a connection, in the system: what a client that does not read costs there

_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}  # s, s, times; as gRPC's own


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the server listens."""

    host: str
    http_port: int
    grpc_port: int


class ApiServer:
    """Binds first, so that a taken port is an error before anything is loaded; serves after."""

    def __init__(
        self,
        host: str,
        http_port: int,
        grpc_port: int,
        tls: Tls | None = None,
        most_connections: int | None = None,
    ) -> None:
        """`tls`: None for plain text; `most_connections`: of HTTP. Conflict when a port is not free."""
        self._tls = tls
        self._most_connections = most_connections
        self._socket = _listen(host, http_port, "HTTP")
        _listen(host, grpc_port, "gRPC").close()  # gRPC takes its port itself, when it starts
        self._host = host
        self._grpc_port = grpc_port
        self._http: uvicorn.Server | None = None
        self._listener: Listener | None = None
        self._grpc: GrpcServer | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self, app: FastAPI, grpc_server: GrpcServer) -> Addresses:
        """Listen on both ports. Returns when both answer."""
        bound = grpc_server.bind(self._host, self._grpc_port)
        await grpc_server.start()
        self._grpc = grpc_server
        config = uvicorn.Config(
            app,
            http=PatientProtocol,
            ws="none",
            loop="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        self._http = uvicorn.Server(config)
        self._http.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]  # the command handles them
        self._serving = asyncio.create_task(self._http.serve(sockets=[]))
        while not self._http.started:  # noqa: ASYNC110  uvicorn has no event for it
            await asyncio.sleep(0.01)
        self._listener = self._listener_of(self._http)
        self._listener.start()
        return Addresses(self._host, self._socket.getsockname()[1], bound)

    def _listener_of(self, http: uvicorn.Server) -> Listener:
        """In place of uvicorn's own, which does not count connections before their TLS handshake is over."""
        return Listener(
            self._socket,
            partial(PatientProtocol, http.config, http.server_state, http.lifespan.state),
            http.server_state.connections,
            context=lambda: self._tls.context if self._tls is not None else None,
            most_connections=self._most_connections,
        )

    async def drain(self, grace_s: float) -> None:
        """Return when the answers that leave by HTTP have left, or the time is over. They may be long, and their
        clients slow, when all requests have ended."""
        assert self._http is not None, "it was started"
        connections = self._http.server_state.connections
        leaving = set(connections)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while leaving := {one for one in leaving & connections if _is_leaving(one)}:  # noqa: ASYNC110  no event
                    await asyncio.sleep(_LOOK_EVERY_S)

    async def stop(self) -> None:
        """Close both. What still runs has had its grace time and gets a moment to say how it ended."""
        if self._grpc is not None:
            await self._grpc.stop(0.5)
        if self._listener is not None:
            self._listener.stop()
        if self._http is not None and self._serving is not None:
            self._http.should_exit = True
            await asyncio.wait([self._serving], timeout=LAST_WORDS_S)
            self._http.force_exit = True
            await asyncio.gather(self._serving, return_exceptions=True)
        self._socket.close()


def _is_leaving(connection: object) -> bool:
    return isinstance(connection, PatientProtocol) and connection.is_leaving


def _listen(host: str, port: int, transport: str) -> socket.socket:
    """A listening TCP socket. Conflict when the port is not free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is stated because asyncio turns Nagle's algorithm off only for sockets that say they are TCP; with it
    # an answer's body waits 40 ms for the client to acknowledge the headers.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)  # its connections inherit it
        _notice_who_is_gone(listener)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        field = f"{transport.lower()}_port"
        raise Conflict(f"{transport} cannot listen on {host}:{port}: {error.strerror}", field=field) from error
    return listener


def _notice_who_is_gone(listener: socket.socket) -> None:
    """Let the system ask clients that are silent whether they are there; connections inherit it. Else a request of
    one that has vanished without a word is computed to its end."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

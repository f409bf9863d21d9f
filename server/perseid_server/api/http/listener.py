"""Accepts HTTP's connections and counts each from its first moment.

uvicorn and event loops tell of a connection when TLS has come about; until then it has a file descriptor too, and costs
a client without a key nothing.
"""

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable, Collection
from typing import Any

from perseid_server.api.http.protocol import PatientProtocol

logger = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 20.0  # of TLS
_MOST_AT_ONCE = 128  # accepted before other work gets its turn
_RETRY_S = 1.0  # after the system had no descriptor or memory for a connection


class Listener:
    """Turns connections on a listening socket into protocols, from `start` to `stop`, on one event loop."""

    def __init__(
        self,
        listening: socket.socket,
        make: Callable[..., PatientProtocol],
        connections: Collection[Any],
        *,
        context: Callable[[], ssl.SSLContext | None],
        most_connections: int | None = None,
    ) -> None:
        """`make`: a protocol, told `on_made`; `connections`: the protocols that have theirs, kept by themselves;
        `context`: of TLS, for a connection that comes now; `most_connections`: beyond them a client is turned away."""
        self._listening = listening
        self._make = make
        self._connections = connections
        self._context = context
        self._most_connections = most_connections
        self._beginning: dict[PatientProtocol, asyncio.Task[None]] = {}
        self._retry: asyncio.TimerHandle | None = None
        self._is_failing = False
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def handshakes(self) -> int:
        """Connections that are not made yet."""
        return len(self._beginning)

    def start(self) -> None:
        """Accept from now on."""
        self._loop = asyncio.get_running_loop()
        self._listening.setblocking(False)
        self._loop.add_reader(self._listening, self._accept)

    def stop(self) -> None:
        """Listen no more, and end handshakes. Connections that are made stay. Again: nothing."""
        if self._loop is not None and self._listening.fileno() >= 0:
            self._loop.remove_reader(self._listening)
        if self._retry is not None:
            self._retry.cancel()
        self._listening.close()
        for task in list(self._beginning.values()):
            task.cancel()

    def _accept(self) -> None:
        for _ in range(_MOST_AT_ONCE):
            try:
                connection, _ = self._listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._pause(error)
                return
            self._is_failing = False
            self._take(connection)

    def _pause(self, error: OSError) -> None:
        """The socket stays readable: without a pause the loop would do nothing else."""
        assert self._loop is not None
        if not self._is_failing:
            logger.error("connections cannot be accepted: %s", error.strerror)
        self._is_failing = True
        self._loop.remove_reader(self._listening)
        self._retry = self._loop.call_later(_RETRY_S, self._loop.add_reader, self._listening, self._accept)

    def _take(self, connection: socket.socket) -> None:
        assert self._loop is not None
        most = self._most_connections
        if most is not None and len(self._beginning) + len(self._connections) >= most:
            connection.close()
            logger.info("a connection is closed: the client is one too many, %d are there", most)
            return
        protocol = self._make(on_made=self._has_begun)
        task = self._loop.create_task(self._begin(connection, protocol))
        self._beginning[protocol] = task
        task.add_done_callback(lambda _: self._has_begun(protocol))

    async def _begin(self, connection: socket.socket, protocol: PatientProtocol) -> None:
        context = self._context()
        timeout_s = HANDSHAKE_TIMEOUT_S if context is not None else None
        connection.setblocking(False)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: protocol, connection, ssl=context, ssl_handshake_timeout=timeout_s
            )
        except OSError as error:  # SSLError is one
            logger.debug("a connection is closed before it has begun: %s", error)

    def _has_begun(self, protocol: PatientProtocol) -> None:
        """It counts among `connections` now, or has failed."""
        with contextlib.suppress(KeyError):
            del self._beginning[protocol]

"""The API process's side of the engine: starts it, talks to it, and starts it again when it dies. No torch.

    starting → ready → restarting → ready → … → stopped
                   ↘ failed (it could not start, and will not)

What the engine must know beside requests (`registrations.py`) is told again to a new engine. Requests are not: when
the engine dies, those in flight end with Unavailable at once.
"""

import asyncio
import contextlib
import logging
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from perseid_server.engine.config import EngineConfig
from perseid_server.engine.messages import (
    Abort,
    EngineFailed,
    EngineReady,
    FromEngine,
    SequenceOutput,
    Shutdown,
    StepOutputs,
    Submit,
    ToEngine,
)
from perseid_server.errors import InvalidRequest, PerseidError, Unavailable
from perseid_server.ipc.codec import HEADER_BYTES, frame_length, from_engine, to_engine
from perseid_server.ipc.inbox import Inbox
from perseid_server.ipc.registrations import Registrations

logger = logging.getLogger(__name__)

EngineStatus = Literal["starting", "ready", "restarting", "failed", "stopped"]

FIRST_BACKOFF_S = 0.1
LONGEST_BACKOFF_S = 10.0
STABLE_AFTER_S = 60.0  # an engine that has run so long starts the backoff anew
STOP_TIMEOUT_S = 5.0
_STREAM_LIMIT = 1 << 24


@dataclass(slots=True)
class _Connection:
    """One running engine process."""

    process: Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, message: ToEngine) -> None:
        self.write(to_engine.encode(message))

    def write(self, frame: bytes) -> None:
        """Nothing when the engine is gone: `receive` tells that, and uvloop raises on a transport that has closed."""
        if not self.writer.transport.is_closing():
            self.writer.write(frame)

    async def receive(self) -> FromEngine:
        """The next message; EOFError or ConnectionError when the engine is gone."""
        header = await self.reader.readexactly(HEADER_BYTES)
        return from_engine.decode(await self.reader.readexactly(frame_length(header)))


@dataclass(slots=True)
class _Watch:
    """Callbacks for the metrics and the registry."""

    on_step: list[Callable[[StepOutputs], None]] = field(default_factory=list)
    on_status: list[Callable[[EngineStatus], None]] = field(default_factory=list)


class EngineProcess(Registrations):
    """Supervises one engine process. All methods run on one event loop."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        entry: str | None = None,
        log_level: str = "warning",
        log_format: Literal["human", "json"] = "human",
    ) -> None:
        """`entry` names another function that builds the engine, as module:function (tests)."""
        super().__init__()
        self._config = config
        self._arguments = [log_level, log_format] if entry is None else [log_level, log_format, entry]
        self._connection: _Connection | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._inboxes: dict[str, Inbox] = {}
        self._watch = _Watch()
        self.status: EngineStatus = "starting"
        self.ready: EngineReady | None = None
        self.num_restarts = 0

    @property
    def pid(self) -> int | None:
        """The engine's process, while there is one that has been ready."""
        return self._connection.process.pid if self._connection is not None else None

    # --- life ---------------------------------------------------------------------------------------------------

    async def start(self) -> EngineReady:
        """Start the engine and wait until it can serve. InvalidRequest tells the operator why it cannot."""
        try:
            connection = await self._launch()
        except BaseException:
            self._set_status("failed")
            raise
        self._supervisor = asyncio.create_task(self._supervise(connection))
        assert self.ready is not None, "_launch() returns when it is"
        return self.ready

    async def stop(self) -> None:
        """End the engine; requests in flight end with Unavailable."""
        self._set_status("stopped")
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        self._fail_requests()
        if self._connection is not None:
            await _end(self._connection)
            self._connection = None

    def on_step(self, callback: Callable[[StepOutputs], None]) -> None:
        """Be told of every step."""
        self._watch.on_step.append(callback)

    def on_status(self, callback: Callable[[EngineStatus], None]) -> None:
        """Be told when the status changes."""
        self._watch.on_status.append(callback)

    # --- requests -----------------------------------------------------------------------------------------------

    async def submit(self, request: Submit) -> AsyncIterator[SequenceOutput]:
        """The outputs of one sequence, to the end. Leaving the iterator early aborts the sequence.

        Unavailable when the engine is not ready, or dies meanwhile.
        """
        connection = self._connection
        if self.status != "ready" or connection is None:
            raise Unavailable(f"the engine is {self.status}; try again")
        inbox = self._inboxes[request.request_id] = Inbox()
        ended = False
        try:
            connection.send(request)
            while not ended:
                output = await inbox.get()
                ended = output.finish_reason is not None
                yield output
        finally:
            self._inboxes.pop(request.request_id, None)
            if not ended and self._connection is connection:
                connection.send(Abort(request.request_id))

    def _tell(self, message: ToEngine) -> None:
        """Now, or when an engine is there again: registrations are replayed to a new one."""
        if self._connection is not None and self.status == "ready":
            self._connection.send(message)

    # --- supervision --------------------------------------------------------------------------------------------

    async def _launch(self) -> _Connection:
        """A new engine process that has said it is ready and knows all that is registered."""
        connection = await self._spawn()
        try:
            first = await connection.receive()
        except (EOFError, ConnectionError) as error:
            await _end(connection)
            status = connection.process.returncode
            raise Unavailable(f"the engine process ended with status {status} while it started") from error
        except BaseException:
            await _end(connection)
            raise
        if isinstance(first, EngineFailed):
            await _end(connection)
            raise InvalidRequest(first.error)
        assert isinstance(first, EngineReady), f"the engine's first message is {type(first).__name__}"
        for message in self.registrations():
            connection.send(message)
        self._connection = connection
        self.num_restarts += self.ready is not None
        self.ready = first
        self._set_status("ready")
        return connection

    async def _spawn(self) -> _Connection:
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "perseid_server.ipc.engine_process",
                str(theirs.fileno()),
                *self._arguments,
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
            )
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=_STREAM_LIMIT)
        body = msgspec.msgpack.encode(self._config)
        connection = _Connection(process, reader, writer)
        connection.write(len(body).to_bytes(HEADER_BYTES, "little") + body)
        return connection

    async def _supervise(self, connection: _Connection) -> None:
        """Deliver what the engine sends; when it dies, start another, more and more patiently."""
        loop = asyncio.get_running_loop()
        backoff_s = FIRST_BACKOFF_S
        while True:
            started = loop.time()
            await self._deliver_until_gone(connection)
            self._connection = None
            self._set_status("restarting")
            self._fail_requests()
            self.adapter_states.clear()
            await _end(connection)
            logger.error("the engine process ended with status %s; starting it again", connection.process.returncode)
            if loop.time() - started > STABLE_AFTER_S:
                backoff_s = FIRST_BACKOFF_S
            while True:
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)
                try:
                    connection = await self._launch()
                except (PerseidError, OSError, msgspec.MsgspecError) as error:
                    logger.error("the engine could not be started again: %s", error)  # noqa: TRY400
                else:
                    break

    async def _deliver_until_gone(self, connection: _Connection) -> None:
        while True:
            try:
                message = await connection.receive()
            except (EOFError, ConnectionError):
                return
            except msgspec.MsgspecError:
                logger.exception("the engine sends what is no message")
                return
            assert isinstance(message, StepOutputs), f"unexpected {type(message).__name__}"
            self._take_states(message)
            for output in message.outputs:
                inbox = self._inboxes.get(output.request_id)
                if inbox is not None and not inbox.put(output):
                    connection.send(Abort(output.request_id))
            for callback in self._watch.on_step:
                try:
                    callback(message)
                except Exception:  # who watches must not end what is watched
                    logger.exception("a step could not be told")
            await asyncio.sleep(0)  # whoever reads, reads before the next step is told

    def _fail_requests(self) -> None:
        for inbox in self._inboxes.values():
            inbox.fail()

    def _set_status(self, status: EngineStatus) -> None:
        self.status = status
        for callback in self._watch.on_status:
            callback(status)


async def _end(connection: _Connection) -> None:
    """Ask the process to end, wait a moment, kill it."""
    process = connection.process
    connection.send(Shutdown())
    connection.writer.close()  # sends what is written; nobody waits for that, a process that hangs does not read
    try:
        await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
    except TimeoutError:
        process.kill()
        await process.wait()

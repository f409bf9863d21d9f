"""One running engine process: started, talked to, ended. Whatever happens, its process is reaped and every descriptor
that it took is given back.
"""

import asyncio
import contextlib
import signal
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from perseid_server.engine.config import EngineConfig
from perseid_server.engine.messages import FromEngine, Shutdown, ToEngine
from perseid_server.ipc.codec import HEADER_BYTES, frame_length, from_engine, to_engine
from perseid_server.ipc.endings import Ending, EngineGone, ending_of, num_oom_kills
from perseid_server.ipc.pulse import Vitals

STOP_TIMEOUT_S = 5.0
STACKS_TIMEOUT_S = 0.5
MOST_MESSAGE_BYTES = 1 << 30
_STREAM_LIMIT = 1 << 24
_STACKS_SIGNAL = signal.SIGUSR1  # as in engine_process.py, which must not be imported here: it brings the engine


@dataclass(slots=True)
class Connection:
    """One running engine process."""

    process: Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    vitals: Vitals
    _num_oom_kills: int = field(default_factory=num_oom_kills)  # when it began

    def send(self, message: ToEngine) -> None:
        """Send a message; nothing when the engine is gone."""
        self.write(to_engine.encode(message))

    def write(self, frame: bytes) -> None:
        """Nothing when the engine is gone: `receive` tells that, and uvloop raises on a transport that has closed."""
        if not self.writer.transport.is_closing():
            self.writer.write(frame)

    async def receive(self) -> FromEngine:
        """The next message. EngineGone when there is none: the engine is gone, or sends what is no message."""
        try:
            length = frame_length(await self.reader.readexactly(HEADER_BYTES))
            if length > MOST_MESSAGE_BYTES:
                raise EngineGone(f"announced a message of {length} bytes", "protocol")
            return from_engine.decode(await self.reader.readexactly(length))
        except (EOFError, OSError) as error:
            raise EngineGone("closed its connection") from error
        except msgspec.MsgspecError as error:
            raise EngineGone(f"sent what is no message: {error}", "protocol") from error

    async def end(self) -> int | None:
        """Ask the process to end, wait a moment, kill it. Its exit status; None when it had to be killed."""
        self.send(Shutdown())
        self.writer.close()  # sends what is written; nobody waits for that, a process that hangs does not read
        with contextlib.suppress(TimeoutError):
            await self._wait(STOP_TIMEOUT_S)
        if self.process.returncode is not None:
            return self.process.returncode
        await _kill(self.process)
        return None

    async def bury(self, gone: EngineGone) -> Ending:
        """End the process that serves no more, if it lives, and say why it ended."""
        if gone.cause == "stuck":
            await self._ask_for_stacks()
        if gone.cause is None:
            status = await self.end()
        else:  # it would not listen
            await _kill(self.process)
            self.writer.close()
            status = None
        return ending_of(gone, status, num_oom_kills() - self._num_oom_kills)

    async def close(self, *, ask: bool = True) -> None:
        """End the process in any case, also when the caller is cancelled meanwhile, and give everything back.
        `ask`: give it a moment to end by itself; while it starts it would not listen."""
        try:
            if ask:
                await self.end()
        finally:
            try:
                await _kill(self.process)
            finally:
                self.writer.close()
                self.vitals.close()

    async def _ask_for_stacks(self) -> None:
        """Let the process write them. One that is stopped cannot."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(_STACKS_SIGNAL)
        with contextlib.suppress(TimeoutError):
            await self._wait(STACKS_TIMEOUT_S)

    async def _wait(self, timeout_s: float) -> None:
        async with asyncio.timeout(timeout_s):
            await self.process.wait()


async def connect(config: EngineConfig, arguments: Sequence[str]) -> Connection:
    """Start an engine process and send it its configuration. `arguments`: log level and format, and an entry."""
    async with contextlib.AsyncExitStack() as undo:
        vitals = Vitals()
        undo.callback(vitals.close)
        ours, theirs = socket.socketpair()
        undo.callback(ours.close)
        with theirs:
            descriptors = [theirs.fileno(), vitals.pulse_descriptor, vitals.stacks_descriptor]
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "perseid_server.ipc.engine_process",
                *map(str, descriptors),
                *arguments,
                pass_fds=descriptors,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
            )
        undo.push_async_callback(_kill, process)
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=_STREAM_LIMIT)
        connection = Connection(process, reader, writer, vitals)
        body = msgspec.msgpack.encode(config)
        connection.write(len(body).to_bytes(HEADER_BYTES, "little") + body)
        undo.pop_all()
        return connection


async def _kill(process: Process) -> None:
    """SIGKILL, which no process can ignore, also not one that is stopped; returns when it has been reaped."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    await process.wait()

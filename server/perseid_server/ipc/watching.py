"""Work on an engine's messages, given up when the engine stands still or is gone."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, NoReturn, TypeVar

from perseid_server.engine.messages import Ping
from perseid_server.ipc.connection import Connection
from perseid_server.ipc.endings import EngineGone, is_stopped
from perseid_server.ipc.pulse import Beat, Phase
from perseid_server.ipc.watchdog import Limits, Watchdog

T = TypeVar("T")

_DOING = {
    Phase.STARTING: "its start",
    Phase.WAITING: "waiting for requests",
    Phase.STEPPING: "a step",
    Phase.COMPILING: "compiling a kernel",
}


async def watched(connection: Connection, limits: Limits, work: Coroutine[Any, Any, T]) -> T:
    """What the work brings. EngineGone when the engine's loop stands still, or its process is gone, meanwhile."""
    working, watching = asyncio.create_task(work), asyncio.create_task(_watch(connection, limits))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return await (working if working.done() else watching)
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _watch(connection: Connection, limits: Limits) -> NoReturn:
    watchdog, has_ended = Watchdog(limits, time.monotonic()), False
    while True:
        await asyncio.sleep(limits.interval_s)
        if has_ended:  # at the last look already: what it sent has been read, and another holds its end of the socket
            raise EngineGone("closed its connection")
        has_ended = connection.process.returncode is not None
        beat = connection.vitals.pulse.read()
        match watchdog.look(beat, time.monotonic()):
            case "ping":
                connection.send(Ping())
            case "stuck":
                raise _stuck(connection, beat, limits)


def _stuck(connection: Connection, beat: Beat, limits: Limits) -> EngineGone:
    limit_s = limits.of(beat.phase)
    if is_stopped(connection.process.pid):
        return EngineGone(f"was stopped (SIGSTOP) for {limit_s:g} s", "stopped")
    return EngineGone(f"did not come to an end with {_DOING[beat.phase]} for {limit_s:g} s", "stuck")

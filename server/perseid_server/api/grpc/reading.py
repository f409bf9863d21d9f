"""How the messages of calls are read: so many at once, so many slowly, none too large.

Of a call whose message is not read nothing is taken beyond a first window. One that is read may be as large as any is
for the transport; only then is its size known.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import grpc

from perseid_server.access.caller import Caller
from perseid_server.api.grpc.handlers import Context
from perseid_server.api.grpc.turns import Turns
from perseid_server.errors import DeadlineExceeded, InvalidRequest, QueueFull
from perseid_server.frontend.shared_limit import SharedLimit

AT_ONCE_S = 0.1  # in which most messages have come
MESSAGE_TIMEOUT_S = 60.0  # in which all have
_RETRY_AFTER_S = 2.0


class Reading:
    """Reads the messages of some calls, which share its places: tenants in turn, those who are none by connection."""

    def __init__(self, at_once: int, late: int, max_bytes: int, on_refusal: Callable[[], None]) -> None:
        """`at_once`: calls whose message is read now; `late`: those whose message did not come then, and is still
        read; `max_bytes`: of a message."""
        self.turns = Turns(at_once)
        self.late = SharedLimit(late)
        self._max_bytes = max_bytes
        self._on_refusal = on_refusal

    async def next(self, context: Context, caller: Caller) -> Any:
        """The call's next message in bytes, or EOF. InvalidRequest when it is too large, QueueFull when it is late and
        there is no room for that, DeadlineExceeded when it does not come."""
        message = await self._read(context, caller)
        num_bytes = 0 if message is grpc.aio.EOF else len(message)
        if num_bytes <= self._max_bytes:
            return message
        del message  # this frame goes with the error, as far as a client that does not read lets it
        raise InvalidRequest(f"the message has {num_bytes} bytes; expected at most {self._max_bytes}")

    async def _read(self, context: Context, caller: Caller) -> Any:
        async with self.turns.turn(caller.tenant or context.peer()):
            reading = asyncio.ensure_future(context.read())
            try:
                await asyncio.wait({reading}, timeout=AT_ONCE_S)
            except asyncio.CancelledError:
                reading.cancel()
                raise
        try:
            await asyncio.sleep(0)  # on a loop that is late it may have come, and not been looked at
            if not reading.done():
                await self._wait_for_late(reading, caller)
            return await reading
        finally:
            reading.cancel()

    async def _wait_for_late(self, reading: asyncio.Future[Any], caller: Caller) -> None:
        if not (self.late.fits(1) and self.late.is_fair(caller, 1)):
            self._on_refusal()
            raise QueueFull(
                f"{self.late.total} messages are on their way already; try again", retry_after_s=_RETRY_AFTER_S
            )
        self.late.take(caller, 1)
        try:
            await asyncio.wait({reading}, timeout=MESSAGE_TIMEOUT_S)
        finally:
            self.late.give_back(caller, 1)
        if not reading.done():
            raise DeadlineExceeded(f"the call's message did not come within {MESSAGE_TIMEOUT_S:g} s")

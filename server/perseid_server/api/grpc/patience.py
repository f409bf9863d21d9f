"""Calls with limits on what a client may send and how long it may take, as PatientProtocol has them for HTTP.

grpc.aio itself waits without end for a call's message, however many of the largest are on their way, and for a client
that does not read its answer. So here calls with one message are handled as if they had a stream of them: it is for
us then when the message is read, and the wire is the same.
"""

import asyncio
import contextlib
import inspect
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Any, TypeAlias

import grpc

from perseid_server.access.caller import Caller, current_caller
from perseid_server.api.body_budget import BodyBudget
from perseid_server.api.grpc.errors import abort
from perseid_server.api.grpc.handlers import Context, Continuation, Found, Handler
from perseid_server.errors import DeadlineExceeded, InvalidRequest, PerseidError, QueueFull
from perseid_server.frontend.shared_limit import SharedLimit

logger = logging.getLogger(__name__)

MOST_READING = 16  # calls whose message is read now; of the others' nothing is taken beyond a first window
AT_ONCE_S = 0.1  # in which most messages have come
MOST_LATE = 16  # calls whose message has not, and is still read
MESSAGE_TIMEOUT_S = 60.0  # in which all have
STALL_TIMEOUT_S = 30.0  # in which a client must take what lies before the next part of its answer
_RETRY_AFTER_S = 2.0

Check: TypeAlias = Callable[[Caller], None]


class Patience(grpc.aio.ServerInterceptor):
    """The outermost: it reads what the others' handlers are given, and sends what they yield."""

    def __init__(self, budget: BodyBudget, doors: Mapping[str, Check]) -> None:
        """`doors`, by service: raises what a caller is told for whom there is no room; nothing is read then."""
        self._budget = budget
        self._doors = doors
        self._reading = asyncio.Semaphore(MOST_READING)
        self._late = SharedLimit(MOST_LATE)

    async def intercept_service(
        self,
        continuation: Continuation,
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Found:
        """grpc.aio."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        service = handler_call_details.method.rpartition("/")[0].lstrip("/")
        check = self._doors.get(service, lambda _: None)
        return self._streaming(handler, check) if handler.response_streaming else self._single(handler, check)

    def _single(self, handler: Handler, check: Check) -> Handler:
        behave: Any = handler.unary_unary

        async def answer(_: object, context: Context) -> Any:
            async with self._request(handler, check, context) as request:
                return await behave(request, context)

        made: Handler = grpc.stream_unary_rpc_method_handler(answer, None, handler.response_serializer)
        return made

    def _streaming(self, handler: Handler, check: Check) -> Handler:
        behave: Any = handler.unary_stream

        async def answer(_: object, context: Context) -> None:
            async with self._request(handler, check, context) as request:
                if inspect.isasyncgenfunction(behave):
                    await _send(behave(request, context), context)
                else:
                    await behave(request, context)

        made: Handler = grpc.stream_stream_rpc_method_handler(answer, None, handler.response_serializer)
        return made

    @contextlib.asynccontextmanager
    async def _request(self, handler: Handler, check: Check, context: Context) -> AsyncIterator[Any]:
        """The call's message, which counts in the budget meanwhile. Errors of ours end the call when all is let go:
        a client that does not read takes its time with them too."""
        try:
            caller = current_caller()
            check(caller)
            message = await self._message(context, caller)
            with self._budget.hold(caller, len(message)):
                decode = handler.request_deserializer
                message = message if decode is None else decode(message)  # what it was made of is not kept
                yield message
        except PerseidError as error:
            await abort(context, error)

    async def _message(self, context: Context, caller: Caller) -> Any:
        await self._reading.acquire()
        reading = asyncio.ensure_future(context.read())
        try:
            try:
                await asyncio.wait({reading}, timeout=AT_ONCE_S)
            finally:
                self._reading.release()
            await asyncio.sleep(0)  # on a loop that is late it may have come, and not been looked at
            if not reading.done():
                await self._wait_for_late(reading, caller)
            message = await reading
        finally:
            reading.cancel()
        if message is grpc.aio.EOF:
            raise InvalidRequest("the call has no message")
        return message

    async def _wait_for_late(self, reading: asyncio.Future[Any], caller: Caller) -> None:
        if not (self._late.fits(1) and self._late.is_fair(caller, 1)):
            self._budget.count_refusal()
            raise QueueFull(
                f"{self._late.total} messages are on their way already; try again", retry_after_s=_RETRY_AFTER_S
            )
        self._late.take(caller, 1)
        try:
            await asyncio.wait({reading}, timeout=MESSAGE_TIMEOUT_S)
        finally:
            self._late.give_back(caller, 1)
        if not reading.done():
            raise DeadlineExceeded(f"the call's message did not come within {MESSAGE_TIMEOUT_S:g} s")


async def _send(answers: AsyncGenerator[Any], context: Context) -> None:
    """When the client leaves, or does not read, the request ends at once."""
    async with contextlib.aclosing(answers):
        async for answer in answers:
            try:
                async with asyncio.timeout(STALL_TIMEOUT_S):
                    await context.write(answer)
            except TimeoutError as error:
                logger.info("a call is ended: the client does not read its answer")
                raise QueueFull(f"the client did not read its answer for {STALL_TIMEOUT_S:g} s") from error

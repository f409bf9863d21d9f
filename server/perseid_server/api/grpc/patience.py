"""Calls with limits on what a client may send and how long it may take, as PatientProtocol has them for HTTP.

grpc.aio itself waits without end for a call's messages, however many of the largest are on their way, and for a client
that does not read its answer. So here all calls are handled as if they had a stream of messages: it is for us then when
the next one is read, and the wire is the same.
"""

import asyncio
import contextlib
import inspect
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Any, TypeAlias

import grpc

from perseid_server.access.caller import Caller, current_caller
from perseid_server.api.body_budget import MAX_BODY_BYTES, BodyBudget
from perseid_server.api.grpc.access import need_of
from perseid_server.api.grpc.errors import abort
from perseid_server.api.grpc.handlers import Context, Continuation, Found, Handler, service_of, shape_of
from perseid_server.api.grpc.reading import Reading
from perseid_server.errors import InvalidRequest, PerseidError, QueueFull
from perseid_server.observe.record import current_call

logger = logging.getLogger(__name__)

MOST_READING = 16
MOST_LATE = 16
FEW_READING = 4  # of small messages, where one that is not small is found out when it has come
OPEN_BYTES = 1 << 10  # of a message to a service that is open to everybody
STREAM_BYTES = 4 << 10  # of each message of a stream
STALL_TIMEOUT_S = 30.0  # in which a client must take what lies before the next part of its answer

Check: TypeAlias = Callable[[Caller], None]


class Patience(grpc.aio.ServerInterceptor):
    """Reads what the handlers of Access and Decoding are given, and sends what they yield.

    Three kinds of calls have places and limits of their own, so that none keeps another waiting: those of tenants,
    those that need no key, and streams of messages (reflection). Small messages do not count in the budget.
    """

    def __init__(self, budget: BodyBudget, doors: Mapping[str, Check]) -> None:
        """`doors`, by service: raises what a caller is told for whom there is no room; nothing is read then."""
        self._budget = budget
        self._doors = doors
        self.tenants = Reading(MOST_READING, MOST_LATE, MAX_BODY_BYTES, budget.count_refusal)
        self.open = Reading(FEW_READING, FEW_READING, OPEN_BYTES, budget.count_refusal)
        self.streams = Reading(FEW_READING, MOST_LATE, STREAM_BYTES, budget.count_refusal)

    async def intercept_service(
        self,
        continuation: Continuation,
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Found:
        """grpc.aio."""
        handler = await continuation(handler_call_details)
        return handler if handler is None else self._patient(handler, handler_call_details.method)

    def _patient(self, handler: Handler, method: str) -> Handler:
        behave = shape_of(handler)[1]

        async def single(_: object, context: Context) -> Any:
            async with self._requested(handler, method, context) as request:
                return await behave(request, context)

        async def streaming(_: object, context: Context) -> None:
            async with self._requested(handler, method, context) as request:
                if inspect.isasyncgenfunction(behave):
                    await _send(behave(request, context), context)
                else:
                    await behave(request, context)

        made: Handler = (
            grpc.stream_stream_rpc_method_handler(streaming, None, handler.response_serializer)
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler(single, None, handler.response_serializer)
        )
        return made

    @contextlib.asynccontextmanager
    async def _requested(self, handler: Handler, method: str, context: Context) -> AsyncIterator[Any]:
        """What the handler is given: the call's message, or the stream of them. Errors of ours end the call when all is
        let go: a client that does not read takes its time with them too."""
        try:
            caller = current_caller()
            if handler.request_streaming:
                async with contextlib.aclosing(self._stream(handler, context, caller)) as messages:
                    yield messages
            elif need_of(method) == "open":
                yield _decoded(handler, await _only(self.open, context, caller))
            else:
                if check := self._doors.get(service_of(method)):
                    check(caller)
                message = await _only(self.tenants, context, caller)
                with self._budget.hold(caller, len(message)):
                    message = _decoded(handler, message)  # what it was made of is not kept
                    yield message
        except PerseidError as error:
            await abort(context, error)

    async def _stream(self, handler: Handler, context: Context, caller: Caller) -> AsyncGenerator[Any]:
        while (message := await self.streams.next(context, caller)) is not grpc.aio.EOF:
            yield _decoded(handler, message)


async def _only(reading: Reading, context: Context, caller: Caller) -> Any:
    try:
        message = await reading.next(context, caller)
    except asyncio.CancelledError:  # the client left, or the transport found the message too large and has told it
        current_call().refused("message_incomplete")
        raise
    if message is grpc.aio.EOF:
        raise InvalidRequest("the call has no message")
    return message


def _decoded(handler: Handler, message: Any) -> Any:
    decode: Any = handler.request_deserializer
    return message if decode is None else decode(message)


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

"""Calls without a message, or with bytes that are none of the method's type, are the client's mistake and told as such.

By itself grpc.aio ends the latter with UNKNOWN, the text of a Python exception and a traceback in the log; a call that
takes one message and is closed without any it leaves open, unanswered. So every method is served as one that takes a
stream of bytes, and they are decoded here.
"""

import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from perseid_server.api.grpc.errors import abort
from perseid_server.errors import InvalidRequest

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Found: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Read: TypeAlias = Callable[[AsyncIterator[bytes]], Awaitable[Any]]
"""What a method is called with, from the bytes of its call."""


class Decoding(grpc.aio.ServerInterceptor):
    """Ends such calls with INVALID_ARGUMENT: all services', health and reflection included."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Found]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Found:
        """grpc.aio."""
        handler = await continuation(handler_call_details)
        return handler if handler is None else _guarded(handler, handler_call_details.method)


def _guarded(handler: _Handler, method: str) -> _Handler:
    decode: Any = handler.request_deserializer

    def decoded(raw: bytes) -> Any:
        try:
            return decode(raw)
        except DecodeError:
            raise InvalidRequest(
                f"the {len(raw)} bytes sent are no message of {method}; expected one as the .proto files have it, its "
                "texts in UTF-8, nested at most 100 deep"
            ) from None

    async def one(requests: AsyncIterator[bytes]) -> Any:
        async for raw in requests:
            return decoded(raw)
        raise InvalidRequest(f"the call was closed without a message; {method} takes one")

    async def each(requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for raw in requests:
            yield decoded(raw)

    async def all_of_them(requests: AsyncIterator[bytes]) -> Any:
        return each(requests)

    read = all_of_them if handler.request_streaming else one
    behave = _behaviour(handler)
    wrapped = _generator(behave, read) if inspect.isasyncgenfunction(behave) else _coroutine(behave, read)
    make: Any = grpc.stream_unary_rpc_method_handler
    if handler.response_streaming:
        make = grpc.stream_stream_rpc_method_handler
    guarded: _Handler = make(wrapped, None, handler.response_serializer)
    return guarded


def _behaviour(handler: _Handler) -> Any:
    """What the method does."""
    return {
        (False, False): handler.unary_unary,
        (False, True): handler.unary_stream,
        (True, False): handler.stream_unary,
        (True, True): handler.stream_stream,
    }[handler.request_streaming, handler.response_streaming]


def _coroutine(behave: Any, read: _Read) -> Callable[[AsyncIterator[bytes], _Context], Awaitable[Any]]:
    """Of methods that answer once, or write their answers to the context."""

    async def guarded(requests: AsyncIterator[bytes], context: _Context) -> Any:
        try:
            return await behave(await read(requests), context)
        except InvalidRequest as error:
            await abort(context, error)
            raise

    return guarded


def _generator(behave: Any, read: _Read) -> Callable[[AsyncIterator[bytes], _Context], AsyncIterator[Any]]:
    """Of methods that yield their answers. When the client leaves, what they hold is let go at once."""

    async def guarded(requests: AsyncIterator[bytes], context: _Context) -> AsyncIterator[Any]:
        try:
            async with contextlib.aclosing(behave(await read(requests), context)) as answers:
                async for answer in answers:
                    yield answer
        except InvalidRequest as error:
            await abort(context, error)

    return guarded

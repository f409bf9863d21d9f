"""Bytes that are no message of the method's type are the client's mistake, and told as such.

By itself grpc.aio ends such a call with UNKNOWN and the text of a Python exception, and logs a traceback.
"""

import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from perseid_server.api.grpc.errors import abort
from perseid_server.errors import InvalidRequest

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Found: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


@dataclass(frozen=True, slots=True)
class _Undecodable:
    """Stands where the message would."""

    num_bytes: int


class Decoding(grpc.aio.ServerInterceptor):
    """Ends calls whose bytes are no message with INVALID_ARGUMENT: all services', health and reflection included."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Found]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Found:
        """grpc.aio."""
        handler = await continuation(handler_call_details)
        return handler if handler is None else _guarded(handler, handler_call_details.method)


def _guarded(handler: _Handler, method: str) -> _Handler:
    make, behave = _shape_of(handler)
    decode = handler.request_deserializer

    def try_to_decode(raw: bytes) -> Any:
        try:
            return raw if decode is None else decode(raw)
        except DecodeError:
            return _Undecodable(len(raw))

    def checked(request: Any) -> Any:
        if isinstance(request, _Undecodable):
            raise InvalidRequest(
                f"the {request.num_bytes} bytes sent are no message of {method}; expected one as the .proto files have "
                "it, its texts in UTF-8, nested at most 100 deep"
            )
        return request

    def read(request: Any) -> Any:
        return _each(request, checked) if handler.request_streaming else checked(request)

    wrap = _generator if inspect.isasyncgenfunction(behave) else _coroutine
    guarded: _Handler = make(wrap(behave, read), try_to_decode, handler.response_serializer)
    return guarded


def _shape_of(handler: _Handler) -> tuple[Any, Any]:
    """How to make such a handler, and what it does."""
    return {
        (False, False): (grpc.unary_unary_rpc_method_handler, handler.unary_unary),
        (False, True): (grpc.unary_stream_rpc_method_handler, handler.unary_stream),
        (True, False): (grpc.stream_unary_rpc_method_handler, handler.stream_unary),
        (True, True): (grpc.stream_stream_rpc_method_handler, handler.stream_stream),
    }[handler.request_streaming, handler.response_streaming]


async def _each(requests: AsyncIterator[Any], checked: Callable[[Any], Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield checked(request)


def _coroutine(behave: Any, read: Callable[[Any], Any]) -> Callable[[Any, _Context], Awaitable[Any]]:
    """Of methods that answer once, or write their answers to the context."""

    async def guarded(request: Any, context: _Context) -> Any:
        try:
            return await behave(read(request), context)
        except InvalidRequest as error:
            await abort(context, error)
            raise

    return guarded


def _generator(behave: Any, read: Callable[[Any], Any]) -> Callable[[Any, _Context], AsyncIterator[Any]]:
    """Of methods that yield their answers. When the client leaves, what they hold is let go at once."""

    async def guarded(request: Any, context: _Context) -> AsyncIterator[Any]:
        try:
            async with contextlib.aclosing(behave(read(request), context)) as answers:
                async for answer in answers:
                    yield answer
        except InvalidRequest as error:
            await abort(context, error)

    return guarded

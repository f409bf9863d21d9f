"""The four shapes of grpc.aio's handlers, for interceptors that put something around what a handler does."""

import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Found: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Continuation: TypeAlias = Callable[[grpc.HandlerCallDetails], Awaitable[Found]]
Around: TypeAlias = Callable[[Context], contextlib.AbstractAsyncContextManager[None]]


def service_of(method: str) -> str:
    """The full name of the service in `/package.Service/Method`."""
    return method.rpartition("/")[0].lstrip("/")


def shape_of(handler: Handler) -> tuple[Any, Any]:
    """How to make such a handler, and what it does."""
    return {
        (False, False): (grpc.unary_unary_rpc_method_handler, handler.unary_unary),
        (False, True): (grpc.unary_stream_rpc_method_handler, handler.unary_stream),
        (True, False): (grpc.stream_unary_rpc_method_handler, handler.stream_unary),
        (True, True): (grpc.stream_stream_rpc_method_handler, handler.stream_stream),
    }[handler.request_streaming, handler.response_streaming]


def put_around(
    behave: Any, around: Around, read: Callable[[Any], Any] = lambda request: request
) -> Callable[[Any, Context], Any]:
    """What a handler does, inside `around(context)`, with `read(request)` for its request. It stays a generator where
    it was one; when the client leaves, what that holds is let go at once."""

    async def answer(request: Any, context: Context) -> Any:  # once, or by context.write
        async with around(context):
            return await behave(read(request), context)

    async def answers(request: Any, context: Context) -> AsyncIterator[Any]:
        async with around(context), contextlib.aclosing(behave(read(request), context)) as told:
            async for one in told:
                yield one

    return answers if inspect.isasyncgenfunction(behave) else answer

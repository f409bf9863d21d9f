"""Writes each gRPC call down, from its metadata to the end of its answer."""

import asyncio
import contextlib
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc

from perseid_server.api.grpc.errors import REQUEST_ID
from perseid_server.observe.calls import Calls
from perseid_server.observe.record import CallRecord, record_for_task

PROBES = "/grpc.health.v1.Health/"
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"
Context = grpc.aio.ServicerContext[Any, Any]


class Observed(grpc.aio.ServerInterceptor):
    """Opens a record when a call comes, gives it an id, and closes it with the task that the call has for itself:
    whatever ends the call ends that. The outermost interceptor, so that what others refuse is told of too."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        """grpc.aio."""
        method = handler_call_details.method
        told = {name: value for name, value in handler_call_details.invocation_metadata or () if isinstance(value, str)}
        call = self._calls.open("grpc", method.lstrip("/"), told, is_probe=method.startswith(PROBES))
        task = asyncio.current_task()
        assert task is not None, "grpc.aio runs each call in a task"
        deadline = _Deadline()
        task.add_done_callback(lambda done: self._close(call, done, deadline))
        record_for_task(call)
        handler = await continuation(handler_call_details)
        if handler is None:
            call.status = grpc.StatusCode.UNIMPLEMENTED.name
            call.refused("unimplemented")
            return None
        return _tagging(handler, call, deadline)

    def _close(self, call: CallRecord, task: "asyncio.Task[Any]", deadline: "_Deadline") -> None:
        """What has not been told by then was cancelled, or is a success."""
        error: BaseException | None = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is not None and call.error is None:
            call.failed(error)
            call.status = deadline.status_of(error)
        call.status = call.status or grpc.StatusCode.OK.name
        self._calls.close(call)


class _Deadline:
    """Of a call, which is cancelled when it has passed."""

    def __init__(self) -> None:
        self.at: float | None = None  # monotonic, s

    def read(self, context: Context) -> None:
        """As soon as it is known."""
        left_s = context.time_remaining()
        self.at = None if left_s is None else time.monotonic() + left_s

    def status_of(self, error: BaseException) -> str:
        """Of a call that ended with what is none of ours."""
        if not isinstance(error, asyncio.CancelledError):
            return grpc.StatusCode.UNKNOWN.name
        passed = self.at is not None and time.monotonic() >= self.at
        return (grpc.StatusCode.DEADLINE_EXCEEDED if passed else grpc.StatusCode.CANCELLED).name


def _tagging(handler: Any, call: CallRecord, deadline: _Deadline) -> _Handler:
    """A handler of the same shape that tells the client the call's id. Streams of requests, which only reflection has,
    stay as they are."""

    def begin(context: Context) -> None:
        deadline.read(context)
        context.set_trailing_metadata(((REQUEST_ID, call.request_id),))

    async def whole(request: Any, context: Context) -> Any:
        begin(context)
        return await handler.unary_unary(request, context)

    async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
        begin(context)
        async with contextlib.aclosing(handler.unary_stream(request, context)) as answers:
            async for answer in answers:
                yield answer

    async def writing(request: Any, context: Context) -> None:  # a stream by `context.write`
        begin(context)
        await handler.unary_stream(request, context)

    if handler.request_streaming:
        untouched: _Handler = handler
        return untouched
    make, behaviour = grpc.unary_unary_rpc_method_handler, whole
    if handler.response_streaming:
        yields = inspect.isasyncgenfunction(handler.unary_stream)
        make, behaviour = grpc.unary_stream_rpc_method_handler, stream if yields else writing
    tagging: _Handler = make(behaviour, handler.request_deserializer, handler.response_serializer)
    return tagging

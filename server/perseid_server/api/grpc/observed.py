"""Writes each gRPC call down, from its metadata to the end of its answer."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import grpc

from perseid_server.api.grpc.errors import REQUEST_ID
from perseid_server.api.grpc.handlers import Context, Continuation, Found, Handler, put_around, shape_of
from perseid_server.frontend.deadline import Deadline
from perseid_server.observe.calls import Calls
from perseid_server.observe.record import ABORTED, CallRecord, record_for_task

PROBES = "/grpc.health.v1.Health/"
_EXCEEDED = "deadline_exceeded"


class Observed(grpc.aio.ServerInterceptor):
    """Opens a record when a call comes, gives it an id, and closes it with the task that the call has for itself:
    whatever ends the call ends that. The outermost interceptor, so that what others refuse is told of too."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def intercept_service(
        self,
        continuation: Continuation,
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Found:
        """grpc.aio."""
        method = handler_call_details.method
        told = {name: value for name, value in handler_call_details.invocation_metadata or () if isinstance(value, str)}
        call = self._calls.open("grpc", method.lstrip("/"), told, is_probe=method.startswith(PROBES))
        running = _Running(call)
        task = asyncio.current_task()
        assert task is not None, "grpc.aio runs each call in a task"
        task.add_done_callback(lambda _: self._close(running))
        record_for_task(call)
        handler = await continuation(handler_call_details)
        if handler is None:
            call.status = grpc.StatusCode.UNIMPLEMENTED.name
            call.refused("unimplemented")
            return None
        return _observed(handler, running)

    def _close(self, running: "_Running") -> None:
        running.end()
        self._calls.close(running.call)


class _Running:
    """What the task of a call does not tell: whether its handler came to its end, and until when it had time."""

    def __init__(self, call: CallRecord) -> None:
        self.call = call
        self.is_complete = False
        self._deadline = Deadline.none()

    @contextlib.asynccontextmanager
    async def handling(self, context: Context) -> AsyncIterator[None]:
        """The handler runs inside."""
        self._deadline = Deadline(time.monotonic(), context.time_remaining())
        context.set_trailing_metadata(((REQUEST_ID, self.call.request_id),))
        try:
            yield
        except Exception as error:
            self.call.failed(error)
            self.call.status = self.call.status or _code_of(context)
            raise
        self.is_complete = True

    def end(self) -> None:
        """A handler that did not come to its end, and did not fail, was cancelled: its client left, or would not wait
        longer."""
        if self.call.status is not None:
            return
        if self.is_complete:
            self.call.status = grpc.StatusCode.OK.name
            return
        passed = self._deadline.is_over or self.call.error == _EXCEEDED
        self.call.status = (grpc.StatusCode.DEADLINE_EXCEEDED if passed else grpc.StatusCode.CANCELLED).name
        self.call.refused(_EXCEEDED if passed else ABORTED)


def _code_of(context: Context) -> str:
    """Of a call that was aborted, by whomever."""
    found = context.code()
    codes = (code.name for code in grpc.StatusCode if found in (code, code.value[0]) and code is not grpc.StatusCode.OK)
    return next(codes, grpc.StatusCode.UNKNOWN.name)


def _observed(handler: Handler, running: _Running) -> Handler:
    make, behave = shape_of(handler)
    observed: Handler = make(
        put_around(behave, running.handling), handler.request_deserializer, handler.response_serializer
    )
    return observed

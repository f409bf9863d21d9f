"""Bytes that are no message of the method's type are the client's mistake, and told as such.

By itself grpc.aio ends such a call with UNKNOWN and the text of a Python exception, and logs a traceback.
"""

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from perseid_server.api.grpc.errors import abort
from perseid_server.api.grpc.handlers import Context, Continuation, Found, Handler, put_around, shape_of
from perseid_server.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class _Undecodable:
    """Stands where the message would."""

    num_bytes: int


class Decoding(grpc.aio.ServerInterceptor):
    """Ends calls whose bytes are no message with INVALID_ARGUMENT: all services', health and reflection included."""

    async def intercept_service(
        self,
        continuation: Continuation,
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Found:
        """grpc.aio."""
        handler = await continuation(handler_call_details)
        return handler if handler is None else _guarded(handler, handler_call_details.method)


def _guarded(handler: Handler, method: str) -> Handler:
    make, behave = shape_of(handler)
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

    guarded: Handler = make(put_around(behave, _telling, read), try_to_decode, handler.response_serializer)
    return guarded


@contextlib.asynccontextmanager
async def _telling(context: Context) -> AsyncIterator[None]:
    try:
        yield
    except InvalidRequest as error:
        await abort(context, error)


async def _each(requests: AsyncIterator[Any], checked: Callable[[Any], Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield checked(request)

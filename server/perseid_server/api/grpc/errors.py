"""Errors as gRPC statuses, with google.rpc details where a client can use them."""

import logging
import math
from collections.abc import Sequence

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from perseid_server.errors import (
    Conflict,
    DeadlineExceeded,
    Forbidden,
    GenerationFailed,
    NotFound,
    PerseidError,
    QueueFull,
    Unauthenticated,
    Unavailable,
)
from perseid_server.observe.record import current_call

logger = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
_MAX_MESSAGE_BYTES = 1000
"""Statuses are trailers: with more than 8 KiB of them (three times over, percent-encoded) clients drop the answer."""

_CODES: Sequence[tuple[type[PerseidError], int]] = (
    (Unauthenticated, code_pb2.UNAUTHENTICATED),
    (Forbidden, code_pb2.PERMISSION_DENIED),
    (NotFound, code_pb2.NOT_FOUND),
    (Conflict, code_pb2.ALREADY_EXISTS),
    (DeadlineExceeded, code_pb2.DEADLINE_EXCEEDED),
    (QueueFull, code_pb2.RESOURCE_EXHAUSTED),
    (Unavailable, code_pb2.UNAVAILABLE),
    (GenerationFailed, code_pb2.INTERNAL),
    (PerseidError, code_pb2.INVALID_ARGUMENT),
)


def status_of(error: PerseidError) -> status_pb2.Status:
    """google.rpc.Status: the code, the message, which field, when to try again."""
    code = next(code for kind, code in _CODES if isinstance(error, kind))
    message = _shortened(error.message)
    details = []
    if error.field is not None and code == code_pb2.INVALID_ARGUMENT:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(math.ceil(1000 * retry_after_s))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        holder = any_pb2.Any()
        holder.Pack(detail)
        packed.append(holder)
    return status_pb2.Status(code=code, message=message, details=packed)


def _shortened(message: str) -> str:
    encoded = message.encode(errors="replace")
    if len(encoded) <= _MAX_MESSAGE_BYTES:
        return message
    return encoded[:_MAX_MESSAGE_BYTES].decode(errors="ignore") + "…"


async def abort(context: "grpc.aio.ServicerContext[object, object]", error: Exception) -> None:
    """End a call with the status of an error. What is not a PerseidError is a bug: logged, not told."""
    call = current_call()
    call.failed(error)
    tag = ((REQUEST_ID, call.request_id),) if call.request_id else ()
    if isinstance(error, PerseidError):
        status = rpc_status.to_status(status_of(error))
        call.status = status.code.name
        await context.abort_with_status(status._replace(trailing_metadata=(*status.trailing_metadata, *tag)))
    logger.error("a call failed", exc_info=error)
    call.status = grpc.StatusCode.INTERNAL.name
    await context.abort(grpc.StatusCode.INTERNAL, "internal error", tag)

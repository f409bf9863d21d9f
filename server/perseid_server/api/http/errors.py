"""Errors as OpenAI's clients know them: {"error": {message, type, param, code}}. Never a traceback."""

import math
import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from perseid_server.access.limits import QuotaSpent
from perseid_server.adapters.names import MAX_LENGTH
from perseid_server.errors import (
    Conflict,
    DeadlineExceeded,
    Forbidden,
    GenerationFailed,
    NotFound,
    PerseidError,
    QueueFull,
    RateLimited,
    TooLarge,
    Unauthenticated,
    Unavailable,
)
from perseid_server.observe.record import current_call

_UNION_MEMBER = re.compile(r"str|int|(list|function|constrained)\W.*")

_STATUS: Sequence[tuple[type[PerseidError], int, str]] = (
    (Unauthenticated, 401, "authentication_error"),
    (Forbidden, 403, "permission_error"),
    (NotFound, 404, "not_found_error"),
    (Conflict, 409, "conflict_error"),
    (TooLarge, 413, "invalid_request_error"),
    (DeadlineExceeded, 408, "timeout_error"),
    (QueueFull, 429, "rate_limit_error"),
    (Unavailable, 503, "service_unavailable_error"),
    (GenerationFailed, 500, "server_error"),
    (PerseidError, 400, "invalid_request_error"),
)


class ModelNotFound(NotFound):
    """The `model` of a request names nothing that is served."""


def model_not_found(name: str) -> ModelNotFound:
    """The error for a name; no adapter's name is longer than what is shown of it."""
    return ModelNotFound(f"the model {name[:MAX_LENGTH]!r} does not exist", field="model")


def status_of(error: PerseidError) -> int:
    """HTTP status of an error."""
    return next(status for kind, status, _ in _STATUS if isinstance(error, kind))


def body_of(error: PerseidError) -> dict[str, Any]:
    """The JSON a client gets."""
    kind = next(name for cls, _, name in _STATUS if isinstance(error, cls))
    codes = (
        (ModelNotFound, "model_not_found"),
        (QuotaSpent, "insufficient_quota"),
        (RateLimited, "rate_limit_exceeded"),
    )
    code = next((code for cls, code in codes if isinstance(error, cls)), None)
    return _body(error.message, kind, error.field, code)


def headers_of(error: PerseidError) -> dict[str, str]:
    """When to try again, and how to say who one is."""
    retry_after_s = getattr(error, "retry_after_s", None)
    headers = {"Retry-After": str(math.ceil(retry_after_s))} if retry_after_s is not None else {}
    return headers | ({"WWW-Authenticate": 'Bearer realm="perseid"'} if isinstance(error, Unauthenticated) else {})


def _body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def _perseid_error(_: Request, error: PerseidError) -> Response:
    current_call().failed(error)
    return JSONResponse(body_of(error), status_of(error), headers_of(error))


async def _validation_error(_: Request, error: RequestValidationError) -> Response:
    body = _validation_body(error)
    current_call().refused("invalid_request", body["error"]["param"])
    return JSONResponse(body, 400)


def _validation_body(error: RequestValidationError) -> dict[str, Any]:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return _body("the body is not valid JSON", "invalid_request_error")
    # A union reports its members too, by type name; the field is what comes before them.
    field = ".".join(str(part) for part in first["loc"][1:] if not _UNION_MEMBER.fullmatch(str(part)))
    if not field:
        message = "the body is not a JSON object, or not sent with Content-Type: application/json"
        return _body(message, "invalid_request_error")
    message = f"{field}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    return _body(message, "invalid_request_error", field)


async def _http_exception(_: Request, error: HTTPException) -> Response:
    kind = next((kind for _, status, kind in _STATUS if status == error.status_code), "invalid_request_error")
    return JSONResponse(_body(str(error.detail), kind), error.status_code, error.headers)


async def _unexpected(request: Request, _: Exception) -> Response:
    """Starlette raises it again behind the answer, and uvicorn writes it into the log."""
    request_id = getattr(request.state, "request_id", "unknown")
    body = _body(f"internal error in request {request_id}", "server_error")
    return JSONResponse(body, 500, {"X-Request-Id": request_id})  # no middleware of ours sees this answer


def install(app: FastAPI) -> None:
    """Map every error that can leave a handler. What is not async would run in a thread of its own."""
    app.add_exception_handler(PerseidError, _perseid_error)  # type: ignore[arg-type]  # narrower than Exception
    app.add_exception_handler(RequestValidationError, _validation_error)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _http_exception)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _unexpected)

"""The OpenAPI document: FastAPI's, with the answers that really come."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from perseid_server.api.http.access import NEEDS
from perseid_server.api.http.answer_schemas import ErrorAnswer

Responses = dict[int | str, dict[str, Any]]

_WHY: Mapping[int, str] = {
    400: "A field of the request is missing, malformed or out of range; `param` names it.",
    401: "No API key, or none that is known.",
    403: "The key, or the operator, does not allow it.",
    404: "There is no such model, adapter, gate set or heads.",
    408: "The request's time is over, or its body came too slowly.",
    409: "The name is taken.",
    413: "The body is too large.",
    429: "Too much is in progress, or the key's limit is reached; try again after Retry-After seconds.",
    500: "The engine gave the request up.",
    503: "The server cannot generate now; try again after Retry-After seconds.",
}
_EVERYWHERE = (413, 429)
_WITH_KEY = (401, 403)
_WITH_BODY = (400, 408)
_RETRIED = (429, 503)
_ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 0}}}


def answers(model: type[BaseModel], *statuses: int) -> Responses:
    """What a route answers: with 200 this, and errors beside those that any route may answer."""
    return {200: {"model": model}} | errors(*statuses)


def errors(*statuses: int) -> Responses:
    """The errors of a route beside those that any may answer."""
    return {status: {"description": _WHY[status]} for status in statuses}


def install(app: FastAPI) -> None:
    """Make the document when it is asked for, once."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's documentation has it


def _document(app: FastAPI) -> dict[str, Any]:
    told = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas = told.setdefault("components", {}).setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    own = ErrorAnswer.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= own.pop("$defs") | {"ErrorAnswer": own}
    for path, operations in told["paths"].items():
        for operation in operations.values():
            _complete(operation, needs_key=NEEDS.get(path) != "open")
    return told


def _complete(operation: dict[str, Any], *, needs_key: bool) -> None:
    """Errors as they are: what FastAPI would answer with 422, this server answers with 400."""
    told = operation["responses"]
    told.pop("422", None)
    with_key = _WITH_KEY if needs_key else ()
    for status in (*_EVERYWHERE, *with_key, *(_WITH_BODY if "requestBody" in operation else ())):
        told.setdefault(str(status), {"description": _WHY[status]})
    for status in sorted(told):
        if int(status) >= 400:
            told[status].setdefault("content", _ERROR)
        if int(status) in _RETRIED:
            told[status].setdefault("headers", _RETRY_AFTER)
    operation["responses"] = dict(sorted(told.items()))

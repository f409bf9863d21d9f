"""Every error a client can be told about, in one tree.

    PerseidError
    ├── InvalidRequest        400  INVALID_ARGUMENT    (names the field)
    │   ├── UnsupportedModel                           (an architecture or file we cannot serve)
    │   └── AdapterRejected                            (an adapter that would not do what its author meant)
    ├── Unauthenticated       401  UNAUTHENTICATED
    ├── Forbidden             403  PERMISSION_DENIED
    ├── NotFound              404  NOT_FOUND
    ├── Conflict              409  ALREADY_EXISTS
    ├── TooLarge              413  INVALID_ARGUMENT
    ├── DeadlineExceeded      408  DEADLINE_EXCEEDED   (what the client would wait is over)
    ├── QueueFull             429  RESOURCE_EXHAUSTED  (retry_after_s)
    │   └── RateLimited                                (one key asks for more than it may)
    ├── Unavailable           503  UNAVAILABLE         (retry_after_s)
    └── GenerationFailed      500  INTERNAL            (the engine gave a request up and says why)

`api/http/errors.py` and `api/grpc/errors.py` map the tree to the wire, once each. Anything else that escapes
a handler is a bug: it is logged with its traceback and the client is told "internal error" and the request id.
"""

import reprlib
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200
_REPR.maxlong = 40
_REPR.maxlevel = 3


def quoted(value: Any) -> str:
    """A value as a message shows it: its repr, cut where it is long or deep."""
    return _REPR.repr(value)


class PerseidError(Exception):
    """The root: `message` is written for the client; `field` names the offending input where there is one."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class InvalidRequest(PerseidError):
    """A field of the request is missing, malformed or out of range."""


class UnsupportedModel(InvalidRequest):
    """A base model whose architecture, file format or quantisation is not supported."""


class AdapterRejected(InvalidRequest):
    """An adapter refused before it could serve a wrong answer: unknown tensor, wrong shape, NaN, unknown key."""


class Unauthenticated(PerseidError):
    """No API key, or none that is known."""


class Forbidden(PerseidError):
    """The operator has not allowed what the client asks for."""


class NotFound(PerseidError):
    """No such model or adapter."""


class Conflict(PerseidError):
    """The name is taken, or the object is in a state that does not admit the operation."""


class TooLarge(PerseidError):
    """A body or file larger than the operator's limit."""


class QueueFull(PerseidError):
    """Too much is waiting already; try again after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimited(QueueFull):
    """The caller's own limit, whatever else the server does; try again after `retry_after_s` seconds."""


class DeadlineExceeded(PerseidError):
    """The time that the client gave the request is over, while it waited or while it ran."""


class Unavailable(PerseidError):
    """The server cannot answer now (starting, draining, engine restarting); try again after `retry_after_s`."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class GenerationFailed(PerseidError):
    """The engine gave this request up: NaN in the model's output, an adapter that cannot be read, no memory."""

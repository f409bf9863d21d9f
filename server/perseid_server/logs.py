"""Log lines for people or for machines, through structlog; the standard library's loggers end here too.

An event may be text of several lines, such as stacks. All that stands beside it is one line, whatever it holds: names
and paths are what clients sent, and must be able neither to begin a line of their own nor to look like another field.
"""

import logging
import re
import sys
from io import StringIO
from typing import Literal, TextIO

import structlog

_PLAIN = re.compile(r"[\w.,:;/@#*+()<>{}-]+", re.ASCII)
_OWN = frozenset({"timestamp", "level", "logger", "event", "exception", "exc_info", "stack_info", "stack"})
"""structlog's own."""


def configure_logging(level: str, style: Literal["human", "json"]) -> None:
    """Send everything to stderr in one style."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _add_fields,
    ]
    renderer: structlog.typing.Processor
    if style == "json":
        shared.append(structlog.processors.format_exc_info)
        renderer = structlog.processors.JSONRenderer()
    else:
        shared.append(_escape)
        # The usual formatter shows local variables: pages of them, and clients' prompts among them.
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=_write_traceback, sort_keys=False
        )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processor=renderer, foreign_pre_chain=shared))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for noisy in ("asyncio", "grpc", "httpx", "urllib3", "filelock", "uvicorn"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _add_fields(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """`extra={"fields": {…}}` of a standard logger stands beside its event."""
    event.update(getattr(event["_record"], "fields", {}))
    return event


def _escape(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """For people; JSON escapes by itself."""
    for name, value in event.items():
        if name == "event":
            event[name] = "".join(map(_printable, str(value).rstrip("\n")))
        elif name not in _OWN and isinstance(value, str):
            event[name] = _Quoted(value)
    return event


class _Quoted:
    """A text that is shown as it is where nothing in it could be taken for something else, and else in quotes."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text if _PLAIN.fullmatch(self._text) else repr(self._text)


def _write_traceback(out: TextIO, error: structlog.typing.ExcInfo) -> None:
    """What an exception says may be a client's text."""
    plain = StringIO()
    structlog.dev.plain_traceback(plain, error)
    out.write("".join(map(_printable, plain.getvalue())))


def _printable(character: str) -> str:
    if character == "\n":
        return "\n    "  # no line of an event looks like the beginning of another
    return character if character.isprintable() or character == "\t" else character.encode("unicode_escape").decode()

"""All calls that are open, and the one place where they are opened and closed."""

import logging
import re
import time
import uuid
from collections.abc import Callable, Collection, Mapping

import structlog

from perseid_server.observe.line import log_line
from perseid_server.observe.record import CallRecord, Transport

logger = logging.getLogger(__name__)

TRACE_HEADERS = ("traceparent", "tracestate")
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_MOST_TRACE_HEADER = 1024  # characters; W3C asks for 512 at least

OnClose = Callable[[CallRecord], Mapping[str, object]]
"""Is told of a call that is over; what it answers is told in its line too."""


class Calls:
    """All methods run on one event loop."""

    def __init__(self, *, log_prompts: bool = False, on_close: OnClose | None = None) -> None:
        """`log_prompts`: keep what clients write, and what they are answered, for the log."""
        self._log_prompts = log_prompts
        self._on_close = on_close
        self._open: dict[int, CallRecord] = {}  # by identity, in order of arrival

    @property
    def open_calls(self) -> Collection[CallRecord]:
        """Those that are not over, the oldest first."""
        return self._open.values()

    def open(
        self, transport: Transport, route: str, headers: Mapping[str, str], *, is_probe: bool = False
    ) -> CallRecord:
        """A call has come. `headers`: by small names; its id is the client's where that fits into a header and a line
        of a log, else a new one. Log lines of this context have the id from now on."""
        stated = headers.get("x-request-id", "")
        call = CallRecord(
            transport,
            route,
            stated if _REQUEST_ID.fullmatch(stated) else uuid.uuid4().hex,
            is_probe,
            self._log_prompts,
            {name: headers[name] for name in TRACE_HEADERS if 0 < len(headers.get(name, "")) <= _MOST_TRACE_HEADER},
        )
        self._open[id(call)] = call
        structlog.contextvars.bind_contextvars(request_id=call.request_id)
        return call

    def close(self, call: CallRecord) -> None:
        """It is over, in whatever way; a second time changes nothing."""
        if self._open.pop(id(call), None) is None:
            return
        call.ended = time.monotonic()
        try:
            log_line(call, self._told_by_listener(call))
        except Exception:  # what is told of a call must not become a failure of it
            logger.exception("call %s could not be told", call.request_id)

    def _told_by_listener(self, call: CallRecord) -> Mapping[str, object]:
        """A listener that fails costs the call no line."""
        try:
            return self._on_close(call) if self._on_close is not None else {}
        except Exception:
            logger.exception("call %s could not be told to who listens", call.request_id)
            return {}

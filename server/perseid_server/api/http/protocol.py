"""uvicorn's HTTP/1.1 connection with limits on how long a client may take, so that idle and slow ones cost little.

uvicorn itself waits without end for the headers of a request and for a client that does not read its answer.
"""

import asyncio
import logging
import uuid
from collections.abc import Callable
from typing import Any

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from perseid_server.api.http.errors import body_of
from perseid_server.api.http.unread import Unread
from perseid_server.errors import InvalidRequest

logger = logging.getLogger(__name__)

HEADERS_TIMEOUT_S = 20.0  # from the first byte of a request to the end of its headers
FIRST_REQUEST_TIMEOUT_S = 75.0  # of a connection that has said nothing yet
STALL_TIMEOUT_S = 30.0  # in which a client must take something of the answer that lies here for it
_LOOKS = 8  # in that time, at what it has taken


class PatientProtocol(H11Protocol):
    """Patient, but not for ever."""

    def __init__(self, *arguments: Any, on_made: Callable[["PatientProtocol"], None], **options: Any) -> None:
        """`on_made` is told when its connection is there, TLS and all."""
        super().__init__(*arguments, **options)
        self._on_made = on_made
        self._has_begun = False  # whether a request's first bytes have come, but not all of its headers
        self._headers_due: asyncio.TimerHandle | None = None
        self._reading_due: asyncio.TimerHandle | None = None
        self._unread: Unread | None = None  # when we looked last
        self._looks_left = _LOOKS  # at the same, before the client is cut off

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        self._on_made(self)
        self._headers_due = self.loop.call_later(FIRST_REQUEST_TIMEOUT_S, self._cut, "sent no request")

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone."""
        for timer in (self._headers_due, self._reading_due):
            if timer is not None:
                timer.cancel()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """The time for headers runs from their first byte, however slowly the others come."""
        super().data_received(data)
        if not self._is_between_requests:
            if self._headers_due is not None:
                self._headers_due.cancel()
                self._headers_due = None
                self._has_begun = False
        elif not self._has_begun:
            self._has_begun = True
            if self._headers_due is not None:
                self._headers_due.cancel()
            self._headers_due = self.loop.call_later(HEADERS_TIMEOUT_S, self._cut, "does not send its headers")

    def pause_writing(self) -> None:
        """More waits to be read than is kept."""
        super().pause_writing()
        self._watch_reading()

    def on_response_complete(self) -> None:
        """All of an answer is written; under TLS nothing else tells how much of it waits to be read."""
        super().on_response_complete()
        self._watch_reading()

    def timeout_keep_alive_handler(self) -> None:
        """A connection is not idle while its answer leaves: closing it would give that half a minute under TLS."""
        if not Unread.of(self.transport):
            super().timeout_keep_alive_handler()
            return
        self._watch_reading()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    @property
    def is_leaving(self) -> bool:
        """Whether an answer is being written, or lies here unread. Of a connection that has not been lost."""
        cycle = self.cycle
        is_written = cycle is None or not cycle.response_started or cycle.response_complete
        return not is_written or bool(Unread.of(self.transport))

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        """What is no HTTP gets an answer as other mistakes do, and the connection ends.

        uvicorn's own fails, with a traceback, where the request was a HEAD or has its answer already.
        """
        if self.conn.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            is_head = self.conn.our_state is h11.SEND_RESPONSE and self.scope["method"] == "HEAD"
            request_id = uuid.uuid4().hex
            logger.info("what is no HTTP/1.1 gets 400", extra={"fields": {"request_id": request_id}})
            body = msgspec.json.encode(body_of(InvalidRequest("the request is not valid HTTP/1.1")))
            headers = [
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(body))),
                ("X-Request-Id", request_id),
                ("Connection", "close"),
            ]
            events = [h11.Response(status_code=400, headers=headers, reason="Bad Request"), h11.EndOfMessage()]
            if not is_head:
                events.insert(1, h11.Data(data=body))
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        if self.cycle is not None:  # whoever works on a request whose body broke off has nobody to answer any more
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    @property
    def _is_between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _watch_reading(self) -> None:
        """Look now and then whether something is read, until all is."""
        if self._reading_due is None:
            self._reading_due = self.loop.call_later(STALL_TIMEOUT_S / _LOOKS, self._look_at_reading)

    def _look_at_reading(self) -> None:
        before, self._unread = self._unread, Unread.of(self.transport)
        self._looks_left = self._looks_left - 1 if self._unread == before else _LOOKS
        self._reading_due = None
        if not self._looks_left:
            self._cut("does not read its answer")
        elif self._unread:
            self._watch_reading()
        else:
            self._unread = None

    def _cut(self, why: str) -> None:
        logger.info("a connection is closed: the client %s", why)
        self.transport.abort()

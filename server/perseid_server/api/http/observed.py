"""Writes each HTTP call down, from its headers to the end of its answer."""

from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perseid_server.observe.calls import Calls
from perseid_server.observe.record import ABORTED, CallRecord, recording

PROBES = frozenset({"/health", "/ready", "/metrics"})
_WORDS = {413: "too_large"}
"""Of statuses that our own errors have too; HTTP's words for the others."""
CLIENT_LEFT = 499
"""What nobody reads; nginx's word for it."""


class Observed:
    """Opens a record when a request comes, gives it an id, and closes it when the request is over. Pure ASGI."""

    def __init__(self, app: ASGIApp, calls: Calls) -> None:
        self._app = app
        self._calls = calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        call = self._calls.open("http", f"{scope['method']} {path}", Headers(scope=scope), is_probe=path in PROBES)
        scope.setdefault("state", {})["request_id"] = call.request_id
        answer = _Answer(call, send)
        try:
            with recording(call):
                await self._app(scope, receive, answer.send)
        except BaseException as error:
            call.failed(error)
            if call.status is None and isinstance(error, Exception):
                call.status = HTTPStatus.INTERNAL_SERVER_ERROR.value  # is sent behind us
            raise
        finally:
            call.route = _route(scope)
            answer.end()
            self._calls.close(call)


class _Answer:
    """What goes to the client."""

    def __init__(self, call: CallRecord, send: Send) -> None:
        self._call = call
        self._send = send
        self._is_complete = False

    async def send(self, message: Message) -> None:
        """ASGI."""
        if message["type"] == "http.response.start":
            self._call.status = message["status"]
            MutableHeaders(scope=message)["X-Request-Id"] = self._call.request_id
        await self._send(message)
        if message["type"] == "http.response.body":
            self._is_complete = not message.get("more_body", False)

    def end(self) -> None:
        """An answer that was not sent to its end is one whose client left."""
        status = self._call.status
        if not self._is_complete or status == CLIENT_LEFT:
            self._call.refused(ABORTED)
            self._call.status = status or CLIENT_LEFT
        elif isinstance(status, int) and status >= HTTPStatus.BAD_REQUEST:
            self._call.refused(_WORDS.get(status) or HTTPStatus(status).name.lower())


def _route(scope: Scope) -> str:
    """The route rather than the path, where there is one: as many as the server has, whatever clients ask for."""
    return f"{scope['method']} {getattr(scope.get('route'), 'path', scope['path'])}"

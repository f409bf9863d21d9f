"""Requests to generate are turned away while there is room for none, before their bodies are read."""

from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from perseid_server.access.caller import Caller, current_caller
from perseid_server.api.http.bodies import refuse
from perseid_server.errors import PerseidError

_GENERATE = frozenset({"/v1/completions", "/v1/chat/completions"})


class Door:
    """Asks once for each such request. Pure ASGI."""

    def __init__(self, app: ASGIApp, check: Callable[[Caller], None]) -> None:
        """`check` raises what a caller is told when there is no room."""
        self._app = app
        self._check = check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in _GENERATE:
            try:
                self._check(current_caller())
            except PerseidError as error:
                await refuse(error, send)
                return
        await self._app(scope, receive, send)

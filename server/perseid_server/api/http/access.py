"""Who may call which route. The key is looked at before anything of the body is read."""

from collections.abc import Iterator, Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perseid_server.access.caller import ANYONE, Caller, calling
from perseid_server.access.gate import Gate, Need, secret_of
from perseid_server.api.http.bodies import refuse
from perseid_server.errors import NotFound, PerseidError
from perseid_server.observe.record import current_call

NEEDS: Mapping[str, Need] = {
    "/health": "open",
    "/ready": "open",
    "/version": "open",
    "/debug/state": "operator",
    "/openapi.json": "any",
    "/tokenize": "generate",
    "/detokenize": "generate",
    "/v1/completions": "generate",
    "/v1/chat/completions": "generate",
    "/v1/models": "generate",
    "/v1/medusa_heads": "generate",
    "/v1/load_lora_adapter": "admin",
    "/v1/unload_lora_adapter": "admin",
}
"""By path; `/metrics` is the operator's unless the gate says otherwise."""
_BELOW: Mapping[str, Need] = {"/v1/models/": "generate", "/v1/medusa_heads/": "generate", "/v1/": "any"}
"""By the beginning of a path. Below /v1/ there is nothing else: any key is told so."""


def need_of(path: str, gate: Gate) -> Need:
    """What a path needs; what is not listed is the operator's, so that a new route is not open by oversight."""
    if path == "/metrics":
        return gate.metrics_need
    below: Iterator[Need] = (need for beginning, need in _BELOW.items() if path.startswith(beginning))
    return NEEDS[path] if path in NEEDS else next(below, "operator")


class Access:
    """Finds out who calls, and tells answers what is left of the caller's limits. Pure ASGI."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if not scope["path"].isprintable():
            # A line break at the end would lead to a route all the same, past what that route needs.
            await refuse(NotFound("no such route"), send)
            return
        headers = Headers(scope=scope)
        secret = secret_of(headers.getlist("authorization"), headers.getlist("x-api-key"))
        known = ANYONE

        def recognised(caller: Caller) -> None:
            nonlocal known
            known = caller
            current_call().recognised(caller)

        try:
            caller = self._gate.enter(secret, need_of(scope["path"], self._gate), recognised)
        except PerseidError as error:
            await refuse(error, self._telling(known, send))
            return
        with calling(caller):
            await self._app(scope, receive, self._telling(caller, send))

    def _telling(self, caller: Caller, send: Send) -> Send:
        if not caller.key:
            return send

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(dict(self._gate.headers(caller)))
            await send(message)

        return tell

"""Bodies are refused when they are too large, come too slowly, or find no room beside those that are held."""

import asyncio
import math
import time

import msgspec
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perseid_server.access.caller import current_caller
from perseid_server.api.body_budget import MAX_BODY_BYTES, BodyBudget, Held
from perseid_server.api.http.errors import body_of, headers_of, status_of
from perseid_server.errors import PerseidError, QueueFull, TooLarge
from perseid_server.observe.record import current_call

BODY_TIMEOUT_S = 20.0
SLOWEST_BODY = 16 << 10  # bytes a second that a long body must come at, after that time
_TOO_LARGE = f"the body is larger than {MAX_BODY_BYTES} bytes"


class Bodies:
    """Looks at a body's size before anything of it is read, and counts while it is. Pure ASGI."""

    def __init__(self, app: ASGIApp, budget: BodyBudget) -> None:
        self._app = app
        self._budget = budget

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        stated = _stated_length(Headers(scope=scope))
        if stated is not None and stated > MAX_BODY_BYTES:
            await refuse(TooLarge(_TOO_LARGE), send)
            return
        try:
            held = self._budget.hold(current_caller(), stated)
        except QueueFull as error:
            await refuse(error, send)
            return
        with held:
            await self._app(scope, _counted(receive, held), send)


def _stated_length(headers: Headers) -> int | None:
    """Bytes; 0 without a body, None where the client does not say (chunks)."""
    if "transfer-encoding" in headers:
        return None
    length = headers.get("content-length", "0")
    return int(length) if length.isdecimal() else None


def _counted(receive: Receive, held: Held) -> Receive:
    """Behind the body, no time is counted. The errors are Starlette's: FastAPI makes 400 of any other."""
    total, is_complete = 0, False
    started = time.monotonic()

    async def counted() -> Message:
        nonlocal total, is_complete
        if is_complete:
            return await receive()
        try:
            async with asyncio.timeout(started + BODY_TIMEOUT_S + total / SLOWEST_BODY - time.monotonic()):
                message = await receive()
        except TimeoutError as error:
            raise HTTPException(408, "the body comes too slowly", {"Connection": "close"}) from error
        is_complete = not message.get("more_body", False)
        total += len(message.get("body", b""))
        if total > MAX_BODY_BYTES:
            raise HTTPException(413, _TOO_LARGE)
        try:
            held.received(total)
        except QueueFull as error:
            current_call().failed(error)
            raise HTTPException(429, error.message, {"Retry-After": str(math.ceil(error.retry_after_s))}) from error
        return message

    return counted


async def refuse(error: PerseidError, send: Send) -> None:
    """Answer without a handler."""
    current_call().failed(error)
    body = msgspec.json.encode(body_of(error))
    told = {"content-type": "application/json", "content-length": str(len(body)), **headers_of(error)}
    headers = [(name.lower().encode(), value.encode()) for name, value in told.items()]
    await send({"type": "http.response.start", "status": status_of(error), "headers": headers})
    await send({"type": "http.response.body", "body": body})

"""Servers as others write them, on a loopback port: what they answer is a dict by route."""

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from aiohttp import web
from aiohttp.test_utils import TestServer

from perseid_loadtest.traffic.http_target import HttpTarget

Answer = object | Callable
"""JSON to answer with, a response, or a handler."""


@asynccontextmanager
async def peer(routes: Mapping[str, Answer]) -> AsyncIterator[str]:
    """A server with these routes and no other; GET or POST, as they are asked."""
    app = web.Application()
    for path, answer in routes.items():
        app.router.add_route("*", path, answer if callable(answer) else says(answer))
    async with TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/")


@asynccontextmanager
async def target_at(routes: Mapping[str, Answer], **options) -> AsyncIterator[HttpTarget]:
    """Connected to it."""
    async with peer(routes) as url:
        target = HttpTarget(url, **options)
        try:
            await target.open()
            yield target
        finally:
            await target.close()


def says(told: object, status: int = 200) -> Callable:
    """A handler that always answers this."""

    async def handler(_: web.Request) -> web.Response:
        return web.Response(text=told if isinstance(told, str) else json.dumps(told), status=status)

    return handler


def streams(*events: object) -> bytes:
    """Server-sent events with their end mark."""
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"

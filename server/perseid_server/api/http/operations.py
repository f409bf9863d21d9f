"""Health, metrics, version, and the tokenizer's two routes."""

import asyncio
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.responses import JSONResponse, PlainTextResponse, Response

from perseid_server import __version__
from perseid_server.api.http.answer_schemas import Prompt, Status, Tokens, VersionAnswer
from perseid_server.api.http.document import answers
from perseid_server.api.http.schemas import DetokenizeBody, TokenizeBody
from perseid_server.api.status import ServerStatus
from perseid_server.frontend.metrics import CONTENT_TYPE, Metrics
from perseid_server.frontend.requests import check_token_ids
from perseid_server.frontend.service import GenerationService


class OperationRoutes:
    """/health, /ready, /metrics, /version, /tokenize, /detokenize."""

    def __init__(self, service: GenerationService, metrics: Metrics, status: ServerStatus) -> None:
        self._service = service
        self._metrics = metrics
        self._status = status
        metrics.watch_ready(lambda: status.is_ready)
        self.router = APIRouter()
        add = self.router.add_api_route
        ready = answers(Status) | {503: {"model": Status, "description": "Not now; it says why."}}
        add("/health", self.health, methods=["GET"], response_model=None, responses=answers(Status))
        add("/ready", self.ready, methods=["GET"], response_model=None, responses=ready)
        add("/metrics", self.metrics, methods=["GET"], response_class=PlainTextResponse)
        add("/version", self.version, methods=["GET"], response_model=None, responses=answers(VersionAnswer))
        add("/tokenize", self.tokenize, methods=["POST"], response_model=None, responses=answers(Tokens, 503))
        add("/detokenize", self.detokenize, methods=["POST"], response_model=None, responses=answers(Prompt))

    async def health(self) -> Response:
        """The server is alive."""
        return JSONResponse({"status": "alive"})

    async def ready(self) -> Response:
        """The server can generate now: the engine runs, and it is not shutting down."""
        if self._status.is_ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": self._status.describe()}, 503, {"Retry-After": "1"})

    async def metrics(self) -> Response:
        """What Prometheus scrapes."""
        return Response(self._metrics.render(), media_type=CONTENT_TYPE)

    async def version(self) -> dict[str, str]:
        """The server's version."""
        return {"version": __version__}

    async def tokenize(self, body: TokenizeBody) -> Response:
        """Tokens of a prompt or conversation. There may be millions: nothing here may hold up the others."""
        text = self._service.text
        tokens = await text.encode(body.input())
        told: dict[str, Any] = {"tokens": tokens, "count": len(tokens), "max_model_len": self._service.max_model_len}
        if body.return_token_strs:
            told["token_strs"] = await asyncio.to_thread(lambda: [text.token_text(token) for token in tokens])
        return Response(msgspec.json.encode(told), media_type="application/json")

    async def detokenize(self, body: DetokenizeBody) -> dict[str, str]:
        """Text of tokens."""
        tokens = tuple(body.tokens)
        check_token_ids("tokens", tokens, self._service.text.vocab_size)
        return {"prompt": self._service.text.decode(tokens, skip_special_tokens=False)}

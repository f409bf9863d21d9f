"""The two generation routes: one shape each, one way of running them."""

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from perseid_server.access.caller import current_caller
from perseid_server.api.http.answer_schemas import ChatCompletion, Completion
from perseid_server.api.http.answers import (
    ChatShape,
    CompletionShape,
    Shape,
    perseid_json,
    token_routing_json,
    usage_json,
)
from perseid_server.api.http.document import answers
from perseid_server.api.http.errors import ModelNotFound, body_of, model_not_found
from perseid_server.api.http.schemas import ChatBody, CompletionBody, SamplingFields
from perseid_server.errors import InvalidRequest, NotFound, PerseidError
from perseid_server.frontend.adaptation_options import AutoOptions, Named
from perseid_server.frontend.generation import Delta, Generation, Usage
from perseid_server.frontend.requests import GenerationRequest, Input, SamplingOptions
from perseid_server.frontend.service import GenerationService
from perseid_server.frontend.streams import merge

T = TypeVar("T")

MAX_PROMPTS = 256
_DONE = b"data: [DONE]\n\n"
_EVENT = {
    "type": "object",
    "description": "An event, with `stream`.",
    "properties": {"data": {"type": "string", "description": "A chunk or an error as JSON; at last [DONE]."}},
    "required": ["data"],
}


class GenerationRoutes:
    """POST /v1/completions and /v1/chat/completions."""

    def __init__(self, service: GenerationService, base: str) -> None:
        self._service = service
        self._base = base
        self.router = APIRouter()
        add = self.router.add_api_route
        told, chat = (answers(model, 404, 500, 503) for model in (Completion, ChatCompletion))
        for responses in (told, chat):
            responses[200]["content"] = {"text/event-stream": {"schema": _EVENT}}
        add("/v1/completions", self.completions, methods=["POST"], response_model=None, responses=told)
        add("/v1/chat/completions", self.chat, methods=["POST"], response_model=None, responses=chat)

    async def completions(self, body: CompletionBody, request: Request) -> Response:
        """Continue a prompt, or several."""
        body.refuse_unsupported()
        shape = CompletionShape(body.model, self._service.text, skip_special_tokens=body.skip_special_tokens)
        return await self._answer(shape, body, body.inputs(), body.options(), request)

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        body.refuse_unsupported()
        shape = ChatShape(body.model, self._service.text)
        return await self._answer(shape, body, [body.input()], body.options(), request)

    async def _answer(
        self, shape: Shape, body: SamplingFields, inputs: Sequence[Input], options: SamplingOptions, request: Request
    ) -> Response:
        if len(inputs) > MAX_PROMPTS:
            raise PerseidError(f"prompt: {len(inputs)} prompts; expected at most {MAX_PROMPTS}", field="prompt")
        report = body.routing or "none"
        if report != "none" and len(inputs) != 1:
            raise InvalidRequest("routing: a report is of one answer; expected one prompt", field="routing")
        adaptation, speculation = body.adaptation(self._base), body.drafting()
        answer_id = shape.prefix + uuid.uuid4().hex
        requests = [
            GenerationRequest(
                f"{answer_id}-{i}" if i else answer_id,
                source,
                adaptation,
                options,
                report,
                speculation,
                timeout_s=body.timeout,
                caller=current_caller(),
            )
            for i, source in enumerate(inputs)
        ]
        async with AsyncExitStack() as stack:  # sees why a request ends: one that is not answered costs nothing
            generations = await _unless_left(request, self._start(stack, requests))
            if body.stream and generations is not None:
                running = stack.pop_all()
                return _Stream(_stream(shape, body, generations, running), running)
            whole = None if generations is None else await _unless_left(request, _whole(shape, generations))
            return Response(status_code=499) if whole is None else whole  # nobody reads that

    async def _start(self, stack: AsyncExitStack, requests: Sequence[GenerationRequest]) -> Sequence[Generation]:
        try:
            return await stack.enter_async_context(self._service.generate_all(requests))
        except (NotFound, InvalidRequest) as error:
            raise _as_model(error, requests[0]) from error


def _as_model(error: PerseidError, request: GenerationRequest) -> PerseidError:
    """What the frontend says of a name, said of `model`, which is where this transport has it."""
    match request.adaptation:
        case Named(name) if isinstance(error, NotFound):
            return model_not_found(name)
        case Named() if error.field == "name":
            return InvalidRequest(f"model: {error.message}", field="model")
        case AutoOptions() if isinstance(error, NotFound):
            return ModelNotFound(error.message, field=error.field)
    return error


async def _numbered(place: int, generation: Generation) -> AsyncGenerator[Delta]:
    """A generation's deltas with the choice numbers of the whole answer."""
    first = place * generation.request.sampling.n
    async for delta in generation:
        yield replace(delta, index=first + delta.index) if first else delta


def _deltas(generations: Sequence[Generation]) -> AsyncGenerator[Delta]:
    streams = [_numbered(place, generation) for place, generation in enumerate(generations)]
    return streams[0] if len(streams) == 1 else merge(streams)


def _total(generations: Sequence[Generation]) -> Usage:
    return Usage.total(one.usage for one in generations)


async def _whole(shape: Shape, generations: Sequence[Generation]) -> Response:
    """Everything in one object."""
    choices: dict[int, list[Delta]] = {}
    async for delta in _deltas(generations):
        choices.setdefault(delta.index, []).append(delta)
    answer = {
        **shape.head(generations[0], chunk=False),
        "choices": [shape.choice(index, deltas) for index, deltas in sorted(choices.items())],
        "usage": usage_json(_total(generations)),
        "perseid": perseid_json(generations, [delta for deltas in choices.values() for delta in deltas]),
    }
    return JSONResponse(answer)


async def _unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """What the work brings. When the client leaves first, None: the work ends at once, whatever it waits for."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(_has_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _has_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(
    shape: Shape, body: SamplingFields, generations: Sequence[Generation], running: AsyncExitStack
) -> AsyncGenerator[bytes]:
    """Server-sent events, one for each delta. An error after the first byte is an event too, once the requests that
    run have ended with it."""
    try:
        async with running, aclosing(_events(shape, body, generations)) as events:
            async for event in events:
                yield event
            yield _DONE
    except PerseidError as error:
        generations[0].request.call.failed(error)
        yield b"data: " + json.dumps(body_of(error)).encode() + b"\n\n" + _DONE


async def _events(shape: Shape, body: SamplingFields, generations: Sequence[Generation]) -> AsyncGenerator[bytes]:
    """All but the last."""
    options = body.stream_options
    with_usage = options is not None and options.include_usage
    head = shape.head(generations[0], chunk=True)

    def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
        usage = {"usage": None} if with_usage else {}
        return b"data: " + msgspec.json.encode({**head, "choices": choices, **usage, **more}) + b"\n\n"

    for index in range(sum(one.request.sampling.n for one in generations)):
        opening = shape.opening(index)
        if opening is not None:
            yield event([opening])
    async for delta in _deltas(generations):
        continuous = options is not None and options.continuous_usage_stats
        more = {"usage": usage_json(_total(generations))} if continuous else {}
        more |= {"perseid": {"routing": token_routing_json([delta])}} if delta.routing else {}
        yield event([shape.delta(delta)], **more)
    if with_usage or generations[0].routing is not None or generations[0].is_lossy:
        told = {"usage": usage_json(_total(generations))} if with_usage else {}
        yield event([], **told, perseid=perseid_json(generations))


class _Stream(StreamingResponse):
    """Closes its events and its requests when the client leaves, so that what they hold is free at once."""

    def __init__(self, chunks: AsyncGenerator[bytes], requests: AsyncExitStack) -> None:
        super().__init__(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._chunks = chunks
        self._requests = requests

    async def stream_response(self, send: Any) -> None:
        try:
            await super().stream_response(send)
        finally:
            async with self._requests:
                await self._chunks.aclose()

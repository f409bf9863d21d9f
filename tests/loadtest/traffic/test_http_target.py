"""What comes over HTTP, read and counted, and every way in which it can go wrong by its kind."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from perseid_loadtest.traffic.events import EventReader
from perseid_loadtest.traffic.http_target import HttpTarget
from perseid_loadtest.traffic.plan import Request
from perseid_loadtest.traffic.target import Answer, Failed
from perseid_server.errors import PerseidError

REQUEST = Request(0, "a", (1, 2, 3), 3)


def event(text: str = "", *, usage: int | None = None, finish: str | None = None) -> bytes:
    told = {"choices": [{"text": text, "finish_reason": finish}]}
    if usage is not None:
        told["usage"] = {"prompt_tokens": 3, "completion_tokens": usage}
    return b"data: " + json.dumps(told).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def read(*pieces: bytes) -> Answer:
    answer = Answer(0.0)
    reader = EventReader(answer)
    for moment, piece in enumerate(pieces):
        reader.feed(piece, float(moment))
    reader.finish()
    return answer


def test_tokens_are_those_that_the_server_tells():
    answer = read(event("a", usage=1), event("", usage=2), event("bc", usage=5, finish="stop"), DONE)
    assert answer.arrivals == [(0.0, 1), (1.0, 1), (2.0, 3)]
    assert (answer.prompt_tokens, answer.output_tokens) == (3, 5)


def test_a_sum_at_the_end_is_shared_by_the_chunks():
    answer = read(event("a"), event("b"), event("", usage=6, finish="stop"), DONE)
    assert answer.arrivals == [(0.0, 3.0), (1.0, 3.0)]
    assert answer.output_tokens == 6


def test_a_chunk_is_a_token_where_nothing_is_told():
    answer = read(event("a"), event(""), event("b"), DONE)
    assert (answer.arrivals, answer.output_tokens) == ([(0.0, 1.0), (2.0, 1.0)], 2)


def test_bytes_may_come_in_any_pieces():
    whole = b": comment\r\n" + event("a", usage=1) + event("b", usage=2) + DONE
    answer = read(*(whole[place : place + 1] for place in range(len(whole))))
    assert [tokens for _, tokens in answer.arrivals] == [1, 1]


def test_text_that_looks_like_usage_is_text():
    assert read(event('"completion_tokens":99', usage=1), DONE).output_tokens == 1


def test_llama_servers_timings_count():
    lines = [{"choices": [{"text": "a"}], "timings": {"prompt_n": 3, "predicted_n": n}} for n in (1, 3)]
    assert read(*(b"data: " + json.dumps(line).encode() + b"\n" for line in lines)).arrivals == [(0.0, 1), (1.0, 2)]


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ({"error": {"message": "no memory", "type": "server_error", "code": None}}, "server_error"),
        ({"error": {"message": "no memory", "code": 503}}, "503"),
        ({"error": "no memory"}, "error event"),
    ],
)
def test_an_error_in_the_stream_has_its_kind(data, kind):
    with pytest.raises(Failed) as failed:
        read(b"data: " + json.dumps(data).encode() + b"\n")
    assert (failed.value.kind, failed.value.message) == (kind, "no memory")


def test_what_is_no_event_is_malformed():
    with pytest.raises(Failed, match="malformed"):
        read(b"data: {broken\n")


# --- over a socket --------------------------------------------------------------------------------------------------


async def streams(request: web.Request, *pieces: bytes, cut: bool = False) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for piece in pieces:
        await response.write(piece)
    if cut:
        assert request.transport is not None
        request.transport.abort()
    return response


async def good(request: web.Request) -> web.StreamResponse:
    return await streams(request, event("a", usage=1), event("b", usage=3, finish="length"), DONE)


async def busy(_: web.Request) -> web.StreamResponse:
    return web.json_response({"error": {"message": "full", "code": None}}, status=429, headers={"Retry-After": "2"})


async def plain(_: web.Request) -> web.StreamResponse:
    return web.Response(text="bad gateway", status=502)


async def cut_off(request: web.Request) -> web.StreamResponse:
    return await streams(request, event("a", usage=1), event("b", usage=2), cut=True)


async def without_end(request: web.Request) -> web.StreamResponse:
    return await streams(request, event("a", usage=1), event("b", usage=2))


async def leaves(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def whole(request: web.Request) -> web.StreamResponse:
    assert "stream" not in await request.json()
    usage = {"prompt_tokens": 3, "completion_tokens": 3}
    return web.json_response({"choices": [{"text": "abc", "finish_reason": "length"}], "usage": usage})


def says(told: object) -> Callable:
    """A handler that always answers this."""

    async def handler(_: web.Request) -> web.Response:
        return web.json_response(told)

    return handler


class Fake:
    """A server whose completions are the handler's; `target` is connected to it."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.headers: list[str | None] = []

    async def start(self, handler: Callable, **options) -> HttpTarget:
        async def completions(request: web.Request) -> web.StreamResponse:
            self.bodies.append(await request.json())
            self.headers.append(request.headers.get("Authorization"))
            return await handler(request)

        app = web.Application()
        app.router.add_post("/v1/completions", completions)
        cards = [{"id": name} for name in ("base", "a", "b", "auto", "auto:gates")]
        app.router.add_get("/v1/models", says({"data": cards}))
        app.router.add_post("/tokenize", says({"tokens": [5, 6, 7, 5]}))
        app.router.add_post("/v1/load_lora_adapter", self._load)
        self.server = TestServer(app)
        await self.server.start_server()
        self.target = HttpTarget(str(self.server.make_url("")), **options)
        await self.target.open()
        return self.target

    async def _load(self, request: web.Request) -> web.Response:
        self.bodies.append(await request.json())
        return web.json_response({"error": {"message": "taken"}}, status=409)

    async def stop(self) -> None:
        await self.target.close()
        await self.server.close()


@pytest.fixture
async def fake() -> AsyncIterator[Fake]:
    one = Fake()
    yield one
    await one.stop()


async def test_a_stream_is_read_to_its_end(fake: Fake):
    target = await fake.start(good, api_key="secret")
    answer = Answer(0.0)
    await target.ask(REQUEST, answer)
    assert ([tokens for _, tokens in answer.arrivals], answer.output_tokens) == ([1, 2], 3)
    body = fake.bodies[0]
    assert (body["model"], body["prompt"], body["max_tokens"]) == ("a", [1, 2, 3], 3)
    assert body["stream_options"]["continuous_usage_stats"] is True
    assert fake.headers == ["Bearer secret"]
    assert target.names == ("a", "b")
    assert await target.vocabulary() == [5, 6, 7]


async def test_a_proxy_of_the_environment_is_not_asked(fake: Fake, monkeypatch, unused_tcp_port: int):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{unused_tcp_port}")
    monkeypatch.delenv("no_proxy", raising=False)
    target = await fake.start(good)
    await target.ask(REQUEST, Answer(0.0))
    assert len(fake.bodies) == 1


async def test_a_whole_answer_is_one_arrival(fake: Fake):
    target = await fake.start(whole, stream=False)
    answer = Answer(0.0)
    await target.ask(Request(0, "", "text", 3), answer)
    assert ([tokens for _, tokens in answer.arrivals], answer.prompt_tokens) == ([3], 3)
    assert (fake.bodies[0]["model"], fake.bodies[0]["prompt"]) == ("base", "text")


@pytest.mark.parametrize(
    ("handler", "kind", "message", "retry_after_s", "tokens"),
    [
        (busy, "429", "full", 2.0, 0),
        (plain, "502", "bad gateway", None, 0),
        (cut_off, "cut off", "", None, 2),
        (without_end, "cut off", "end mark", None, 2),
        (leaves, "connection", "", None, 0),
    ],
)
async def test_failures_by_kind(fake: Fake, handler, kind, message, retry_after_s, tokens):
    target = await fake.start(handler)
    answer = Answer(0.0)
    with pytest.raises(Failed) as failed:
        await target.ask(REQUEST, answer)
    assert (failed.value.kind, failed.value.retry_after_s, answer.output_tokens) == (kind, retry_after_s, tokens)
    assert message in failed.value.message


async def test_a_load_that_is_refused_is_told(fake: Fake):
    target = await fake.start(good)
    with pytest.raises(Failed) as failed:
        await target.load("x", "/folder", replace=True)
    assert (failed.value.kind, failed.value.message) == ("409", "taken")
    assert fake.bodies == [{"lora_name": "x", "lora_path": "/folder", "load_inplace": True}]


async def test_a_server_that_has_gone_is_a_connection_error(fake: Fake):
    target = await fake.start(good)
    await fake.server.close()
    with pytest.raises(Failed, match="connection"):
        await target.ask(REQUEST, Answer(0.0))


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (404, "{}", "HTTP 404; is this an OpenAI-compatible server"),
        (401, "{}", "--api-key"),
        (200, "<html>", "no list of models"),
        (200, '{"data": [{}]}', "no list of models"),
    ],
)
async def test_what_is_no_such_server_is_one_line(status, body, message):
    async def models(_: web.Request) -> web.Response:
        return web.Response(text=body, status=status)

    app = web.Application()
    app.router.add_get("/v1/models", models)
    async with TestServer(app) as server:
        target = HttpTarget(str(server.make_url("")))
        with pytest.raises(PerseidError, match=message):
            await target.open()
        await target.close()


async def test_nobody_there_is_one_line(unused_tcp_port: int):
    target = HttpTarget(f"http://127.0.0.1:{unused_tcp_port}")
    with pytest.raises(PerseidError, match="cannot connect \\(connection refused\\); is a server running there"):
        await asyncio.wait_for(target.open(), 5)
    await target.close()

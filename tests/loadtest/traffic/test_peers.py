"""vLLM, llama-server and a bare server, each as it answers: adapters, tokens and what it does not understand."""

import asyncio

import pytest
from aiohttp import web

from perseid_loadtest.traffic.events import read_whole
from perseid_loadtest.traffic.plan import Request
from perseid_loadtest.traffic.target import Answer, Failed
from tests.loadtest.traffic.peers import streams, target_at

COMPLETIONS, MODELS = "/v1/completions", "/v1/models"


class Peer:
    """Answers completions with these bytes; refuses what `refused` says of a body."""

    def __init__(self, body: bytes, refused=lambda _: None) -> None:
        self.bodies: list[dict] = []
        self._body = body
        self._refused = refused

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        if (told := self._refused(body)) is not None:
            return web.json_response({"error": {"message": told}} if isinstance(told, str) else told, status=400)
        return web.Response(body=self._body)


async def ask(target, adapter: str = "") -> Answer:
    answer = Answer(0.0)
    await target.ask(Request(0, adapter, (1, 2, 3), 3), answer)
    return answer


def tokens(answer: Answer) -> list[float]:
    return [tokens for _, tokens in answer.arrivals]


async def test_vllm_without_usage_in_each_chunk():
    events = (
        {"choices": [{"index": 0, "delta": {"role": "assistant"}, "text": "", "finish_reason": None}]},
        *({"choices": [{"index": 0, "text": text, "finish_reason": None}]} for text in "ab"),
        {"choices": [{"index": 0, "text": "", "finish_reason": "length"}], "usage": None},
        {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}},
    )
    vllm = Peer(streams(*events))
    cards = {"data": [{"id": "org/base", "owned_by": "vllm"}, {"id": "sql", "parent": "org/base"}]}
    async with target_at({MODELS: cards, COMPLETIONS: vllm.answer}) as target:
        answer = await ask(target, "sql")
    assert (target.names, vllm.bodies[0]["model"]) == (("sql",), "sql")
    assert (tokens(answer), answer.prompt_tokens, answer.output_tokens) == ([2.0, 2.0], 3, 4)
    assert answer.tokens_told


async def test_llama_server():
    events = [{"choices": [{"text": "a"}], "timings": {"prompt_n": 3, "predicted_n": n}} for n in (1, 3)]
    llama = Peer(streams(*events))
    routes = {
        MODELS: {"data": [{"id": "base.gguf", "owned_by": "llamacpp"}]},
        "/lora-adapters": [{"id": 0, "path": "sql.gguf", "scale": 1.0}],
        COMPLETIONS: llama.answer,
    }
    async with target_at(routes) as target:
        answer = await ask(target, "sql")
        await ask(target)
    assert (target.names, tokens(answer), answer.prompt_tokens) == (("sql",), [1, 2], 3)
    assert [body["lora"] for body in llama.bodies] == [[{"id": 0, "scale": 1.0}], [{"id": 0, "scale": 0.0}]]


BARE = streams(*({"choices": [{"text": text}]} for text in "abc"))


async def test_a_server_that_counts_nothing():
    async with target_at({COMPLETIONS: Peer(BARE).answer}, model="m") as target:
        answer = await ask(target)
    assert (tokens(answer), answer.output_tokens, answer.tokens_told) == ([1.0] * 3, 3, False)


@pytest.mark.parametrize("words", ["Unknown parameter: 'stream_options'.", "field include_usage is not permitted"])
async def test_a_server_that_refuses_stream_options_is_asked_without(words: str):
    bare = Peer(BARE, lambda body: words if "stream_options" in body else None)
    async with target_at({COMPLETIONS: bare.answer}, model="m") as target:
        answers = await asyncio.gather(*(ask(target) for _ in range(5)))
        seen = len(bare.bodies)
        await ask(target)
    assert [tokens(answer) for answer in answers] == [[1.0] * 3] * 5
    assert ["stream_options" in body for body in bare.bodies[seen:]] == [False]


async def test_a_server_that_knows_usage_at_the_end_alone_is_asked_for_that():
    def refused(body: dict) -> str | None:
        return "unknown continuous_usage_stats" if "continuous_usage_stats" in body.get("stream_options", {}) else None

    peer = Peer(BARE, refused)
    async with target_at({COMPLETIONS: peer.answer}, model="m") as target:
        await ask(target)
    assert peer.bodies[-1]["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("stream", [True, False])
async def test_a_server_that_refuses_all_is_asked_no_more_than_three_times(stream: bool):
    peer = Peer(b"", lambda _: "stream_options and all else")
    async with target_at({COMPLETIONS: peer.answer}, model="m", stream=stream) as target:
        with pytest.raises(Failed, match="400"):
            await ask(target)
    assert len(peer.bodies) == (3 if stream else 1)


REFUSED_EOS = {
    "in words": {"error": {"message": "Unrecognized request argument supplied: ignore_eos"}},
    "by its name beside them": {"error": {"message": "Extra inputs are not permitted", "param": "ignore_eos"}},
    "as FastAPI does": {"detail": [{"type": "extra_forbidden", "loc": ["body", "ignore_eos"], "msg": "Extra inputs"}]},
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("told", REFUSED_EOS.values(), ids=REFUSED_EOS)
async def test_a_server_that_refuses_ignore_eos_is_asked_without(told: object, stream: bool):
    whole = b'{"choices": [{"text": "words"}], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}'
    strict = Peer(BARE if stream else whole, lambda body: told if "ignore_eos" in body else None)
    async with target_at({COMPLETIONS: strict.answer}, model="m", stream=stream) as target:
        assert not target.stops_at_eos
        answers = await asyncio.gather(*(ask(target) for _ in range(5)))
        seen = len(strict.bodies)
        await ask(target)
        assert target.stops_at_eos
    assert [answer.output_tokens for answer in answers] == [3 if stream else 2] * 5
    assert ["ignore_eos" in body for body in strict.bodies[seen:]] == [False]
    assert all("stream_options" in body for body in strict.bodies) == stream


async def test_a_server_that_refuses_ignore_eos_and_stream_options_is_asked_without_both():
    def refused(body: dict) -> str | None:
        extra = [name for name in ("stream_options", "ignore_eos") if name in body]
        return f"unknown: {', '.join(extra)}" if extra else None

    strict = Peer(BARE, refused)
    async with target_at({COMPLETIONS: strict.answer}, model="m") as target:
        await ask(target)
    assert not strict.bodies[-1].keys() & {"stream_options", "ignore_eos"}


async def test_a_server_that_takes_ignore_eos_goes_on_after_an_end_token():
    peer = Peer(BARE)
    async with target_at({COMPLETIONS: peer.answer}, model="m") as target:
        await ask(target)
        assert not target.stops_at_eos
    assert peer.bodies[0]["ignore_eos"] is True


async def test_another_refusal_is_not_asked_again():
    peer = Peer(b"", lambda _: "unknown field temperature")
    async with target_at({COMPLETIONS: peer.answer}, model="m") as target:
        with pytest.raises(Failed):
            await ask(target)
    assert len(peer.bodies) == 1


@pytest.mark.parametrize("usage", ["", ', "usage": null', ', "usage": {"completion_tokens": 0}'])
def test_a_whole_answer_that_is_not_counted_is_one_token(usage: str):
    answer = Answer(0.0)
    read_whole(f'{{"choices": [{{"text": "words"}}]{usage}}}'.encode(), answer)
    assert (tokens(answer), answer.output_tokens, answer.tokens_told) == ([1], 1, False)


def test_a_whole_answer_without_text_and_count_is_empty():
    answer = Answer(0.0)
    read_whole(b'{"choices": [{"text": ""}]}', answer)
    assert (answer.arrivals, answer.output_tokens, answer.tokens_told) == ([], 0, True)

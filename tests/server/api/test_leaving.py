"""A client may leave at any stage of its request, on either transport, streaming or not: nothing of it is left."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc
import pytest

from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from tests.server.api.real_engine import serving_process
from tests.server.stack import LiveStack, until

Leave = Callable[[], Awaitable[None]]

PROMPT = "say it again " * 12  # several chunks of prefill
LONG = "a long story " * 1000  # tokenized in a thread
HTTP, GRPC = "http", "grpc"


@asynccontextmanager
async def asking(
    live: LiveStack, transport: str, stream: bool, prompt: str, adapter: str, max_tokens: int = 80
) -> AsyncIterator[Leave]:
    """A request that is sent and not waited for; what is yielded makes its client leave."""
    begin = _http if transport == HTTP else _grpc
    async with begin(live, stream, prompt, adapter, max_tokens) as leave:
        yield leave


@asynccontextmanager
async def _http(live: LiveStack, stream: bool, prompt: str, adapter: str, max_tokens: int) -> AsyncIterator[Leave]:
    body = json.dumps(
        {"model": adapter or "tiny", "prompt": prompt, "max_tokens": max_tokens, "stream": stream}
    ).encode()
    _, writer = await asyncio.open_connection(live.addresses.host, live.addresses.http_port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    writer.write(head.encode() + b"\r\n\r\n" + body)

    async def leave() -> None:
        writer.transport.abort()

    yield leave
    writer.close()


@asynccontextmanager
async def _grpc(live: LiveStack, stream: bool, prompt: str, adapter: str, max_tokens: int) -> AsyncIterator[Leave]:
    message = pb.GenerateRequest(prompt=prompt, adapter=adapter, sampling=pb.SamplingParams(max_tokens=max_tokens))
    async with grpc.aio.insecure_channel(live.grpc) as channel:
        stub = stubs.GenerationStub(channel)
        if stream:
            call = stub.GenerateStream(message)
            reading = asyncio.ensure_future(call.read())
        else:
            call = reading = stub.Generate(message)

        async def leave() -> None:
            call.cancel()
            await asyncio.wait({reading} if stream else {asyncio.ensure_future(call.code())})

        yield leave
        await asyncio.gather(reading, return_exceptions=True)


async def nothing_is_left(live: LiveStack) -> None:
    """Of any request, anywhere."""
    stack = live.stack
    await until(lambda: stack.service._admission.in_progress == 0)
    assert stack.service._admission.tokens_in_progress == 0
    assert not stack.registry.leases.versions()
    assert not stack.engine.engine.has_work
    assert stack.engine.engine.stats().kv_blocks_used == 0
    assert not any(stack.engine.engine._residency.users.values())
    await until(lambda: stack.budget.num_bytes == 0)


@pytest.fixture(autouse=True)
async def adapter(live: LiveStack) -> str:
    return await live.stack.load("one")


every_way = pytest.mark.parametrize(("transport", "stream"), [(t, s) for t in (HTTP, GRPC) for s in (False, True)])


@every_way
async def test_in_the_queue(live: LiveStack, transport: str, stream: bool) -> None:
    live.stack.engine.hold()
    async with asking(live, transport, stream, PROMPT, "one") as leave:
        await live.stack.engine.submissions(1)
        assert live.stack.service._admission.in_progress == 1
        assert live.stack.registry.leases.versions()
        await leave()
        await live.stack.engine.aborts(1)
        await nothing_is_left(live)


@every_way
async def test_while_its_adapter_loads(live: LiveStack, transport: str, stream: bool, adapter: str) -> None:
    residency = live.stack.engine.engine._residency
    residency.delay = 1 << 60
    async with asking(live, transport, stream, PROMPT, "one") as leave:
        await until(lambda: adapter in residency.loading)
        assert live.stack.registry.leases.versions() == {adapter}
        await leave()
        await live.stack.engine.aborts(1)
        await nothing_is_left(live)


@every_way
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
async def test_while_it_runs(live: LiveStack, transport: str, stream: bool, num_tokens: int) -> None:
    """Amid its prefill (no token), at its first token, and later."""
    live.stack.engine.hold()
    async with asking(live, transport, stream, PROMPT, "one") as leave:
        await live.stack.engine.submissions(1)
        core = live.stack.engine.engine
        while not (core.stats().kv_blocks_used and _num_tokens(live) >= num_tokens):
            live.stack.engine._step()
        assert _num_tokens(live) == num_tokens
        await leave()
        await live.stack.engine.aborts(1)
        await nothing_is_left(live)


def _num_tokens(live: LiveStack) -> int:
    """Of the request, as the engine has them."""
    [sequence] = live.stack.engine.engine._sequences.values()
    return sequence.num_output


@every_way
async def test_while_its_prompt_is_tokenized(
    live: LiveStack, monkeypatch: pytest.MonkeyPatch, transport: str, stream: bool
) -> None:
    text, go_on = live.stack.service.text, threading.Event()

    class Slow:
        def encode_batch(self, texts: list[str], **options: bool) -> object:
            assert go_on.wait(30)
            return real.encode_batch(texts, **options)

    real = text.tokenizer
    monkeypatch.setattr(text, "tokenizer", Slow())
    try:
        async with asking(live, transport, stream, LONG, "one") as leave:
            await until(lambda: text.tokenizing.characters == len(LONG))
            assert live.stack.registry.leases.versions()
            await leave()
            await nothing_is_left(live)  # while the thread is at it still
            assert text.tokenizing.characters == len(LONG)
            assert not live.stack.engine.submitted
    finally:
        go_on.set()
    await until(lambda: text.tokenizing.characters == 0)


@pytest.mark.parametrize(("transport", "stream"), [(HTTP, False), (GRPC, True)])
async def test_a_real_engine_stops_amid_an_answer(
    tmp_path, monkeypatch: pytest.MonkeyPatch, transport: str, stream: bool
) -> None:
    async with serving_process(tmp_path / "process", "build_slow", monkeypatch) as process:
        engine = process.stack.engine
        async with asking(process, transport, stream, "say", "", max_tokens=1900) as leave:
            await until(lambda: engine.stats.num_running == 1)
            await leave()
            await until(lambda: engine.stats.num_running == 0)
        assert engine.stats.kv_blocks_used == 0
        assert engine.num_steps < 1900
        await until(lambda: process.stack.service._admission.in_progress == 0)
        assert not engine._in_flight

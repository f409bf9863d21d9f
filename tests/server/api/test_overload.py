"""While no request can come in, callers are told so at once: nothing of theirs is read, and each has an answer."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_status import rpc_status

from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from perseid_server.frontend.requests import GenerationRequest, TextInput
from tests.server.access.rings import bearer, gate_of, key
from tests.server.stack import LiveStack, make_stack, serving

BODY = {"model": "tiny", "prompt": "say", "max_tokens": 4}
MESSAGE = pb.GenerateRequest(prompt="say", sampling=pb.SamplingParams(max_tokens=4))
HEAD = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"


@contextlib.asynccontextmanager
async def full(tmp_path, monkeypatch: pytest.MonkeyPatch, **options: object) -> AsyncIterator[LiveStack]:
    """A server whose queue is full, and whose tokenizer may not be asked."""
    stack = make_stack(tmp_path, max_queue=1, **options)
    async with serving(stack) as live, stack.service.generate(GenerationRequest("first", TextInput("say"))):
        monkeypatch.setattr(stack.service.text, "encode", None)
        yield live


async def status_of(live: LiveStack, path: bytes) -> bytes:
    """Of a request whose body is never sent."""
    reader, writer = await asyncio.open_connection(live.addresses.host, live.addresses.http_port)
    writer.write(HEAD % path)
    head = await reader.readuntil(b"\r\n\r\n")
    writer.close()
    assert b"retry-after: " in head.lower()
    assert b"x-request-id: " in head.lower()
    return head[9:12]


async def never() -> AsyncIterator[bytes]:
    """A message that is not sent."""
    await asyncio.Event().wait()
    yield b""


async def test_a_full_queue_reads_no_body(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with full(tmp_path, monkeypatch) as live, asyncio.timeout(30):
        for path in (b"/v1/completions", b"/v1/chat/completions"):
            assert set(await asyncio.gather(*(status_of(live, path) for _ in range(200)))) == {b"429"}
        async with live.http() as client:
            assert (await client.post("/tokenize", json={"model": "tiny"})).status_code == 400  # others are read
        live.stack.service.draining.begin()
        assert await status_of(live, b"/v1/completions") == b"503"


async def test_a_full_queue_reads_no_message(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with full(tmp_path, monkeypatch) as live, grpc.aio.insecure_channel(live.grpc) as channel:
        for method in ("Generate", "GenerateStream"):
            calls = [channel.stream_unary(f"/perseid.v1.Generation/{method}")(never()) for _ in range(200)]
            for call in calls:
                assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert "1 requests are in progress, the limit is 1" in await call.details()
        live.stack.service.draining.begin()
        call = channel.stream_unary("/perseid.v1.Generation/Generate")(never())
        assert await call.code() is grpc.StatusCode.UNAVAILABLE


async def test_each_of_thousands_of_calls_at_once_is_told_when_to_come_back(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def one(stub: stubs.GenerationStub) -> tuple[grpc.StatusCode, int]:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Generate(MESSAGE)
        status = rpc_status.from_call(refused.value)
        return refused.value.code(), 0 if status is None else len(status.details)

    async with full(tmp_path, monkeypatch) as live, contextlib.AsyncExitStack() as stay:
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [
            await stay.enter_async_context(grpc.aio.insecure_channel(live.grpc, options))
            for _ in range(4)  # each has a thousand calls at once
        ]
        generations = [stubs.GenerationStub(channel) for channel in channels]
        told = await asyncio.gather(*(one(generations[place % 4]) for place in range(3500)))
        assert Counter(told) == {(grpc.StatusCode.RESOURCE_EXHAUSTED, 1): 3500}


async def test_a_tenants_full_share_turns_away_that_tenant_alone(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = make_stack(tmp_path, max_queue=5, gate=gate_of(key("flood"), key("other")))
    async with serving(stack) as live, live.http() as client:
        stack.engine.hold()

        def ask(who: str) -> asyncio.Task:
            return asyncio.create_task(client.post("/v1/completions", json=BODY, headers=bearer(who)))

        running = [ask("flood") for _ in range(4)]
        await stack.engine.submissions(4)
        assert (await ask("flood")).status_code == 429
        running.append(ask("other"))
        await stack.engine.submissions(5)
        stack.engine.go_on()
        assert {(await task).status_code for task in running} == {200}

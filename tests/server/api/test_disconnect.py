"""A client that leaves frees what its request holds: nobody computes for someone who is gone."""

import asyncio
import json

import grpc
import httpx
import pytest
from starlette.requests import ClientDisconnect

from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from tests.server.stack import LiveStack

BODY = {"model": "one", "prompt": "say", "max_tokens": 200, "n": 2}


async def freed(live: LiveStack, count: int) -> None:
    """Return when the sequences have been aborted and nothing of them is left."""
    async with asyncio.timeout(20):
        await live.stack.engine.aborts(count)
        await live.stack.service._idle.wait()
    assert not live.stack.registry.leases.versions()
    assert live.stack.engine.engine.stats().kv_blocks_used == 0
    assert not live.stack.engine.engine.has_work


@pytest.fixture(autouse=True)
async def adapter(live: LiveStack) -> None:
    await live.stack.load("one")


async def test_leaving_an_http_stream_before_the_first_token(live: LiveStack) -> None:
    live.stack.engine.hold()
    async with live.http() as client, client.stream("POST", "/v1/completions", json=BODY | {"stream": True}):
        await live.stack.engine.submissions(2)
    await freed(live, 2)


async def test_leaving_an_http_stream_amid_tokens(live: LiveStack) -> None:
    async with live.http() as client:
        async with client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as response:
            async for line in response.aiter_lines():
                if line:
                    live.stack.engine.hold()
                    break
        await freed(live, 2)


async def test_leaving_before_the_headers_of_a_stream(live: LiveStack) -> None:
    body = json.dumps(BODY | {"stream": True}).encode()
    headers = [(b"content-type", b"application/json")]
    about = {"type": "http", "asgi": {"spec_version": "2.4"}, "http_version": "1.1", "method": "POST"}
    scope = about | {"path": "/v1/completions", "query_string": b"", "headers": headers}

    messages = iter([{"type": "http.request", "body": body}])

    async def receive() -> dict[str, object]:
        return next(messages, None) or await asyncio.Event().wait()

    async def send(_: object) -> None:
        raise OSError("the connection is closed")

    with pytest.raises(ClientDisconnect):
        await live.stack.app(scope, receive, send)
    await freed(live, 0)


async def test_leaving_while_the_whole_answer_is_computed(live: LiveStack) -> None:
    live.stack.engine.hold()
    async with live.http() as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post("/v1/completions", json=BODY, timeout=0.2)
    await live.stack.engine.submissions(2)
    await freed(live, 2)


@pytest.mark.parametrize("read_first", [False, True])
async def test_cancelling_a_grpc_stream(live: LiveStack, read_first: bool) -> None:
    async with grpc.aio.insecure_channel(live.grpc) as channel:
        message = pb.GenerateRequest(prompt="say", adapter="one", sampling=pb.SamplingParams(max_tokens=200, n=2))
        if not read_first:
            live.stack.engine.hold()
        call = stubs.GenerationStub(channel).GenerateStream(message)
        if read_first:
            await call.read()
            live.stack.engine.hold()
        await live.stack.engine.submissions(2)
        call.cancel()
        await freed(live, 2)


async def test_cancelling_a_grpc_call(live: LiveStack) -> None:
    live.stack.engine.hold()
    async with grpc.aio.insecure_channel(live.grpc) as channel:
        message = pb.GenerateRequest(prompt="say", adapter="one", sampling=pb.SamplingParams(max_tokens=200, n=2))
        call = asyncio.ensure_future(stubs.GenerationStub(channel).Generate(message))
        await live.stack.engine.submissions(2)
        call.cancel()
        await freed(live, 2)


async def test_a_grpc_deadline_ends_the_request(live: LiveStack) -> None:
    live.stack.engine.hold()
    async with grpc.aio.insecure_channel(live.grpc) as channel:
        message = pb.GenerateRequest(prompt="say", adapter="one", sampling=pb.SamplingParams(max_tokens=200))
        asking = asyncio.ensure_future(stubs.GenerationStub(channel).Generate(message, timeout=1))
        await live.stack.engine.submissions(1)
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await asking
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await freed(live, 1)

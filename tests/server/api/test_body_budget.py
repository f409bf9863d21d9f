"""What clients send has bounded room: too much is refused before it is read, and ordinary requests go on."""

import asyncio
import contextlib
import json
import logging
import os

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from perseid_server.access.caller import Caller
from perseid_server.api.body_budget import LARGE_TOTAL_BYTES, MAX_BODY_BYTES, SMALL_BYTES, BodyBudget
from perseid_server.errors import QueueFull
from perseid_server.frontend.metrics.processes import resident_bytes
from tests.server.access.rings import gate_of, key
from tests.server.stack import LiveStack, Stack, make_stack, serving, until

BODY = {"model": "tiny", "prompt": "say", "max_tokens": 4}
MESSAGE = pb.GenerateRequest(prompt="say", sampling=pb.SamplingParams(max_tokens=4))
ANYONE = Caller()


def padded(size: int) -> bytes:
    """A good body of so many bytes."""
    data = json.dumps(BODY).encode()
    return data + b" " * (size - len(data))


# --- the budget alone -----------------------------------------------------------------------------------------------


def test_small_bodies_have_room_of_their_own() -> None:
    budget = BodyBudget(100, 2 * SMALL_BYTES)
    with budget.hold(ANYONE, SMALL_BYTES + 1), budget.hold(ANYONE, 100):
        for stated in (SMALL_BYTES + 1, 1):
            with pytest.raises(QueueFull, match="bytes of requests this large are held"):
                budget.hold(ANYONE, stated)
        assert budget.num_bytes == SMALL_BYTES + 101
    assert budget.num_bytes == 0


def test_a_body_of_unknown_size_counts_as_it_comes() -> None:
    refused: list[str] = []
    budget = BodyBudget(0, 1000, refused.append)
    with budget.hold(ANYONE, None) as first, budget.hold(ANYONE, None) as second:
        first.received(600)
        first.received(700)
        second.received(300)
        with pytest.raises(QueueFull):
            second.received(301)
        assert budget.num_bytes == 1000
    assert (budget.num_bytes, refused) == (0, ["bytes"])


def test_a_stated_size_counts_once() -> None:
    budget = BodyBudget()
    with budget.hold(ANYONE, 500) as held:
        held.received(300)
        held.received(500)
        assert budget.num_bytes == 500


def test_a_tenant_leaves_room_for_the_next() -> None:
    budget = BodyBudget(1000, 1000)
    with contextlib.ExitStack() as stay:
        for _ in range(8):
            stay.enter_context(budget.hold(Caller("flood"), 100))
        with pytest.raises(QueueFull):
            budget.hold(Caller("flood"), 100)
        stay.enter_context(budget.hold(Caller("other"), 100))


# --- HTTP -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stack(tmp_path) -> Stack:
    budget = BodyBudget(4096, 2 * SMALL_BYTES)
    return make_stack(tmp_path, budget=budget)


async def send(live: LiveStack, data: bytes, *headers: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection(live.addresses.host, live.addresses.http_port)
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json", *headers]
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
    return reader, writer


async def head(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(20):
        return await reader.readuntil(b"\r\n\r\n")


async def test_too_much_is_refused_before_it_is_read_and_small_bodies_go_on(live: LiveStack) -> None:
    budget = live.stack.budget
    size = SMALL_BYTES + 1
    _, first = await send(live, b"{", f"Content-Length: {size}")
    await until(lambda: budget.num_bytes == size)
    reader, second = await send(live, b"", f"Content-Length: {size}")  # nothing of it is sent
    told = await head(reader)
    assert told.startswith(b"HTTP/1.1 429 ")
    assert b"\r\nretry-after: 2\r\n" in told.lower()
    assert b'"rate_limit_error"' in await reader.readuntil(b"}}")
    async with live.http() as client:
        assert (await client.post("/v1/completions", json=BODY)).status_code == 200
        first.close()
        await until(lambda: budget.num_bytes == 0)
        large = await client.post("/v1/completions", content=padded(size), headers={"Content-Type": "application/json"})
        assert large.status_code == 200
    second.close()


async def test_chunks_are_refused_when_the_room_is_full(live: LiveStack, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    budget = live.stack.budget
    reader, writer = await send(live, b"", "Transfer-Encoding: chunked")
    chunk = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
    for count in range(1, 5):
        writer.write(chunk)
        await until(lambda count=count: budget.num_bytes == count * 0x8000)
    writer.write(chunk)
    told = await head(reader)
    assert told.startswith(b"HTTP/1.1 429 ")
    assert b"\r\nretry-after: 2\r\n" in told.lower()
    assert b'"rate_limit_error"' in await reader.readuntil(b"}}")
    await until(lambda: budget.num_bytes == 0 and not live.stack.calls.open_calls)
    assert [record.fields["error"] for record in caplog.records if hasattr(record, "fields")] == ["queue_full"]
    writer.close()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_body_counts_until_its_request_has_ended(live: LiveStack, stream: bool) -> None:
    live.stack.engine.hold()
    data = json.dumps(BODY | {"stream": stream}).encode()
    _, writer = await send(live, data, f"Content-Length: {len(data)}")
    await live.stack.engine.submissions(1)
    assert live.stack.budget.num_bytes == len(data)
    live.stack.engine.go_on()
    await until(lambda: live.stack.budget.num_bytes == 0)
    writer.close()


async def test_many_of_the_largest_take_little_memory(tmp_path) -> None:
    """Two dozen clients with 16 MiB each, all at once."""
    body = padded(MAX_BODY_BYTES)
    async with serving(make_stack(tmp_path)) as live:
        budget, most = live.stack.budget, 0
        before = resident_bytes(os.getpid())
        grown = 0

        async def ask() -> bytes:
            reader, writer = await send(live, b"", f"Content-Length: {len(body)}")
            answering = asyncio.create_task(head(reader))
            for start in range(0, len(body), 1 << 18):
                nonlocal most, grown
                with contextlib.suppress(ConnectionError):
                    writer.write(body[start : start + (1 << 18)])
                    await writer.drain()
                most = max(most, budget.num_bytes)
                grown = max(grown, resident_bytes(os.getpid()) - before)
            told = await answering
            writer.close()
            return told[9:12]

        async def ordinary() -> int:
            async with live.http() as client:
                return (await client.post("/v1/completions", json=BODY)).status_code

        statuses = asyncio.gather(*(ask() for _ in range(24)))
        await until(lambda: budget.num_bytes >= LARGE_TOTAL_BYTES)
        assert await ordinary() == 200
        assert set(await statuses) == {b"200", b"429"}
        assert most <= LARGE_TOTAL_BYTES + SMALL_BYTES
        assert grown < 2.5 * LARGE_TOTAL_BYTES  # joining and parsing take as much again for a moment
        await until(lambda: budget.num_bytes == 0)


# --- gRPC -----------------------------------------------------------------------------------------------------------


def large() -> pb.GenerateRequest:
    """A good message that is not small."""
    message = pb.GenerateRequest()
    message.CopyFrom(MESSAGE)
    message.MergeFromString(b"\xfa\xff\x7f" + b"\x80\x80\x04" + bytes(0x10000))  # a field of tomorrow
    return message


async def test_messages_count_until_their_calls_have_ended(live: LiveStack) -> None:
    live.stack.engine.hold()
    message = large()
    async with grpc.aio.insecure_channel(live.grpc) as channel:
        generation = stubs.GenerationStub(channel)
        calls = [generation.Generate(message), generation.GenerateStream(MESSAGE)]
        await live.stack.engine.submissions(2)
        assert live.stack.budget.num_bytes == message.ByteSize() + MESSAGE.ByteSize()
        live.stack.engine.go_on()
        await calls[0]
        assert [chunk async for chunk in calls[1]]
        await until(lambda: live.stack.budget.num_bytes == 0)


async def test_a_message_without_room_is_refused_on_both_kinds_of_calls(live: LiveStack) -> None:
    live.stack.engine.hold()
    async with grpc.aio.insecure_channel(live.grpc) as channel:
        generation = stubs.GenerationStub(channel)
        first = asyncio.ensure_future(generation.Generate(large()))
        await live.stack.engine.submissions(1)
        for call in (generation.Generate(large()), generation.GenerateStream(large()).read()):
            with pytest.raises(grpc.aio.AioRpcError, match="requests this large are held") as refused:
                await call
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            status, retry = rpc_status.from_call(refused.value), error_details_pb2.RetryInfo()
            assert status.details[0].Unpack(retry)
            assert retry.retry_delay.seconds == 2
        assert 'rejected_total{reason="bytes"} 0' in live.stack.metrics.render().decode()  # this budget tells nobody
        live.stack.engine.go_on()
        assert (await first).choices


async def test_without_a_key_a_message_is_not_even_waited_for(tmp_path) -> None:
    never = asyncio.Event()

    async def message():
        await never.wait()
        yield b""

    async with (
        serving(make_stack(tmp_path, gate=gate_of(key("user")))) as live,
        grpc.aio.insecure_channel(live.grpc) as channel,
    ):
        for make in (channel.stream_unary, channel.stream_stream):
            method = "Generate" if make == channel.stream_unary else "GenerateStream"
            call = make(f"/perseid.v1.Generation/{method}")(message())
            assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
        assert live.patience.tenants.late.total == 0


async def test_refusals_are_counted(tmp_path) -> None:
    stack = make_stack(tmp_path)
    with stack.budget.hold(ANYONE, LARGE_TOTAL_BYTES), pytest.raises(QueueFull):
        stack.budget.hold(ANYONE, SMALL_BYTES + 1)
    assert 'perseid_requests_rejected_total{reason="bytes"} 1' in stack.metrics.render().decode()

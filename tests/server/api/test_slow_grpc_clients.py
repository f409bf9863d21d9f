"""gRPC clients that do not read, or do not send: they are ended after a limit, and nobody else notices."""

import asyncio
import re
from collections.abc import AsyncIterator

import grpc
import pytest

from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from perseid_server.api.grpc import patience, reading
from perseid_server.ipc.inbox import MAX_UNREAD
from tests.fakes import expected
from tests.server.api.real_engine import serving_process
from tests.server.stack import LiveStack, until

SHORT = pb.GenerateRequest(prompt="say", sampling=pb.SamplingParams(max_tokens=12, temperature=0.0))
LONG = pb.GenerateRequest(
    prompt="tell", sampling=pb.SamplingParams(max_tokens=3900, temperature=0.0, logprobs=20, ignore_eos=True)
)
LAZY = [  # what the client's side keeps does not hold the answer
    ("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16384),
]  # fmt: skip


async def answer(channel: grpc.aio.Channel) -> tuple[int, ...]:
    told = await stubs.GenerationStub(channel).Generate(SHORT, timeout=30)
    return tuple(told.choices[0].token_ids)


async def rest(call: grpc.aio.UnaryStreamCall) -> tuple[list[int], grpc.aio.AioRpcError]:
    """What a client finds that reads at last: tokens, then how the call ended."""
    tokens: list[int] = []
    try:
        while (chunk := await call.read()) is not grpc.aio.EOF:
            tokens += chunk.token_ids
    except grpc.aio.AioRpcError as error:
        return tokens, error
    raise AssertionError(f"the answer is complete, {len(tokens)} tokens")


async def test_who_does_not_read_is_ended_and_who_reads_is_answered_as_ever(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "STALL_TIMEOUT_S", 1.0)
    right = expected(tuple(b"say"), None, 12)
    async with (
        serving_process(tmp_path, "build_long", monkeypatch, max_num_seqs=32) as live,
        grpc.aio.insecure_channel(live.grpc, LAZY) as lazy,
        grpc.aio.insecure_channel(live.grpc) as quick,
    ):
        engine = live.stack.engine
        calls = [stubs.GenerationStub(lazy).GenerateStream(LONG) for _ in range(8)]
        first = [await call.read() for call in calls]
        assert all(chunk.token_ids for chunk in first)
        while live.stack.service._admission.in_progress:
            assert await answer(quick) == right
            assert all(flight.inbox._outputs.qsize() <= MAX_UNREAD for flight in engine._in_flight.values())
        assert not engine._in_flight
        assert await answer(quick) == right
        assert engine.stats.kv_blocks_used == 0
        assert engine.stats.num_running == engine.stats.num_waiting == 0
        for call in calls:
            tokens, ended = await rest(call)
            assert 0 < len(tokens) < 3900
            assert ended.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            # Which limit comes first, of time or of what is kept, depends on how busy the machine is.
            assert re.search("did not read its answer|reads too slowly", ended.details())


async def test_the_engine_gives_up_an_answer_nobody_takes_before_the_call_is_ended(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        serving_process(tmp_path, "build_long", monkeypatch) as live,
        grpc.aio.insecure_channel(live.grpc, LAZY) as channel,
    ):
        call = stubs.GenerationStub(channel).GenerateStream(LONG)
        await call.read()
        await until(lambda: live.stack.engine.stats.num_running == 1)
        await until(lambda: live.stack.engine.stats.kv_blocks_used == 0)
        assert live.stack.engine.num_steps < 3000  # it did not come to its end
        assert live.stack.service._admission.in_progress == 1
        tokens, ended = await rest(call)
        assert len(tokens) < 3900
        assert ended.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "reads too slowly" in ended.details()
        await until(lambda: live.stack.service._admission.in_progress == 0)


# --- clients that do not send ---------------------------------------------------------------------------------------


async def nothing(until: asyncio.Event) -> AsyncIterator[bytes]:
    """A message that does not come."""
    await until.wait()
    yield SHORT.SerializeToString()


def begin(channel: grpc.aio.Channel, until: asyncio.Event, method: str = "Generate") -> grpc.aio.StreamUnaryCall:
    """A call whose headers are sent and whose message is not: for the server the wire is that of any call."""
    return channel.stream_unary(f"/perseid.v1.Generation/{method}")(nothing(until))


async def late(live: LiveStack, count: int) -> None:
    """Return when so many messages are known to be late."""
    await until(lambda: live.patience.tenants.late.total == count)


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_a_message_that_does_not_come(live: LiveStack, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setattr(reading, "MESSAGE_TIMEOUT_S", 0.1)
    async with grpc.aio.insecure_channel(live.grpc) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="message did not come within") as ended:
            await begin(channel, asyncio.Event(), method)
        assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await late(live, 0)


async def test_a_call_without_a_message(live: LiveStack) -> None:
    async def none() -> AsyncIterator[bytes]:
        return
        yield

    async with grpc.aio.insecure_channel(live.grpc) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="has no message") as ended:
            await channel.stream_unary("/perseid.v1.Generation/Generate")(none())
        assert ended.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_few_messages_may_be_late_and_others_are_answered(
    live: LiveStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "AT_ONCE_S", 0.05)
    monkeypatch.setattr(live.patience.tenants.late, "limit", 2)
    come = asyncio.Event()
    async with grpc.aio.insecure_channel(live.grpc) as channel:
        waiting = [begin(channel, come) for _ in range(2)]
        await late(live, 2)
        with pytest.raises(grpc.aio.AioRpcError, match="2 messages are on their way") as refused:
            await begin(channel, asyncio.Event())
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await answer(channel) == expected(tuple(b"say"), None, 12)
        come.set()
        for call in waiting:
            told = pb.GenerateResponse.FromString(await call)
            assert tuple(told.choices[0].token_ids) == expected(tuple(b"say"), None, 12)
        await late(live, 0)


async def test_who_leaves_before_the_message_is_forgotten(
    live: LiveStack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reading, "AT_ONCE_S", 0.05)
    async with grpc.aio.insecure_channel(live.grpc) as channel:
        call = begin(channel, asyncio.Event())
        await late(live, 1)
        call.cancel()
        await late(live, 0)
    assert not caplog.records


async def test_few_messages_are_read_at_once_and_those_who_leave_make_room(
    live: LiveStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "AT_ONCE_S", 60.0)
    turns = live.patience.tenants.turns
    async with grpc.aio.insecure_channel(live.grpc) as channel:
        calls = [begin(channel, asyncio.Event()) for _ in range(2 * patience.MOST_READING)]
        await until(lambda: turns.num_waiting == patience.MOST_READING)
        asking = asyncio.create_task(answer(channel))
        await until(lambda: turns.num_waiting == patience.MOST_READING + 1)
        for call in calls:
            call.cancel()
        assert await asking == expected(tuple(b"say"), None, 12)
    await until(lambda: turns.num_free == patience.MOST_READING)

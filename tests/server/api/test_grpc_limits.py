"""What one gRPC client may take: it neither closes the server to others nor fills its memory, with a key or without."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from perseid_server.api.grpc import patience
from perseid_server.api.grpc.generation import GenerationServicer
from tests.server.access.rings import bearer, gate_of, key
from tests.server.stack import LiveStack, make_stack, serving, until

SHORT = pb.GenerateRequest(prompt="say", sampling=pb.SamplingParams(max_tokens=2))
GENERATE = "/perseid.v1.Generation/Generate"
CHECK = "/grpc.health.v1.Health/Check"
ALONE = (("grpc.use_local_subchannel_pool", 1),)  # a connection of its own


@pytest_asyncio.fixture
async def keyed(tmp_path) -> AsyncIterator[LiveStack]:
    """With keys of two tenants."""
    async with serving(make_stack(tmp_path, gate=gate_of(key("user"), key("other")))) as live:
        yield live


async def answer(channel: grpc.aio.Channel, secret: str = "user") -> int:
    metadata = tuple(bearer(secret).items())
    told = await stubs.GenerationStub(channel).Generate(SHORT, metadata=metadata, timeout=30)
    return told.usage.completion_tokens


async def slowly(channel: grpc.aio.Channel, live: LiveStack, secret: str = "user") -> int:
    """An honest call whose message comes when the server knows that it is late."""
    before = live.patience.tenants.late.total

    async def message() -> AsyncIterator[bytes]:
        await until(lambda: live.patience.tenants.late.total > before)
        yield SHORT.SerializeToString()

    call = channel.stream_unary(GENERATE)(message(), metadata=tuple(bearer(secret).items()), timeout=30)
    return pb.GenerateResponse.FromString(await call).usage.completion_tokens


async def test_an_answer_may_be_larger_than_any_request(live: LiveStack, monkeypatch: pytest.MonkeyPatch) -> None:
    large = pb.Choice(text="x" * (17 << 20))
    monkeypatch.setattr(GenerationServicer, "_choice", lambda *_: large)
    async with grpc.aio.insecure_channel(live.grpc, [("grpc.max_receive_message_length", -1)]) as channel:
        told = await stubs.GenerationStub(channel).Generate(SHORT, timeout=30)
    assert told.choices[0] == large


async def test_the_log_says_of_which_calls_the_message_did_not_come(
    live: LiveStack, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with grpc.aio.insecure_channel(live.grpc, [("grpc.max_send_message_length", -1)]) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="larger than max") as refused:
            await stubs.GenerationStub(channel).Generate(pb.GenerateRequest(prompt="x" * (17 << 20)), timeout=30)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await until(lambda: not live.stack.calls.open_calls)
    (line,) = [record.fields for record in caplog.records if record.name == "perseid_server.calls"]
    assert line["error"] == "message_incomplete"


# --- without a key --------------------------------------------------------------------------------------------------


async def test_who_watches_holds_nothing_of_the_tenants_budget(keyed: LiveStack) -> None:
    async with grpc.aio.insecure_channel(keyed.grpc) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="x" * 500))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        assert keyed.stack.budget.num_bytes == 0


@pytest.mark.parametrize("method", ["Check", "Watch"])
async def test_a_message_to_health_is_small(keyed: LiveStack, method: str) -> None:
    async with grpc.aio.insecure_channel(keyed.grpc) as channel:
        call = getattr(health_pb2_grpc.HealthStub(channel), method)(health_pb2.HealthCheckRequest(service="x" * 2000))
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "has 2003 bytes; expected at most 1024" in await call.details()


async def test_few_may_watch(keyed: LiveStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyed.health.watches, "limit", 2)
    async with (
        grpc.aio.insecure_channel(keyed.grpc, ALONE) as one,
        grpc.aio.insecure_channel(keyed.grpc, ALONE) as other,
        grpc.aio.insecure_channel(keyed.grpc, ALONE) as third,
    ):
        watches = [
            health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()) for channel in (one, other)
        ]
        for watch in watches:
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        refused = health_pb2_grpc.HealthStub(third).Watch(health_pb2.HealthCheckRequest())
        assert await refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "2 calls watch already" in await refused.details()
        assert (await health_pb2_grpc.HealthStub(third).Check(health_pb2.HealthCheckRequest())).status
        watches[0].cancel()
        await until(lambda: keyed.health.watches.total == 1)
        again = health_pb2_grpc.HealthStub(third).Watch(health_pb2.HealthCheckRequest())
        assert (await again.read()).status == health_pb2.HealthCheckResponse.SERVING


async def test_one_connection_leaves_others_room_to_watch(keyed: LiveStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyed.health.watches, "limit", 10)
    async with (
        grpc.aio.insecure_channel(keyed.grpc, ALONE) as greedy,
        grpc.aio.insecure_channel(keyed.grpc, ALONE) as other,
    ):
        many = [health_pb2_grpc.HealthStub(greedy).Watch(health_pb2.HealthCheckRequest()) for _ in range(12)]
        codes = [await watch.code() for watch in many if await _is_refused(watch)]
        assert len(codes) == 4
        assert set(codes) == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        watch = health_pb2_grpc.HealthStub(other).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING


async def _is_refused(watch: grpc.aio.UnaryStreamCall) -> bool:
    try:
        await watch.read()
    except grpc.aio.AioRpcError:
        return True
    return False


async def test_calls_without_a_key_take_no_tenants_place(keyed: LiveStack, monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        grpc.aio.insecure_channel(keyed.grpc, ALONE) as channel,
        grpc.aio.insecure_channel(keyed.grpc, ALONE) as evil,
    ):
        silent = [evil.stream_unary(CHECK)() for _ in range(patience.MOST_LATE)]
        late, calls = keyed.patience.open.late, keyed.stack.calls.open_calls
        await until(lambda: 0 < late.total == len(calls))  # the others are refused
        assert await slowly(channel, keyed) == 2
        assert await answer(channel) == 2
        for call in silent:
            call.cancel()


# --- with a key -----------------------------------------------------------------------------------------------------


async def test_a_crowd_of_one_key_lets_others_through(keyed: LiveStack) -> None:
    metadata = tuple(bearer("user").items())
    async with (
        grpc.aio.insecure_channel(keyed.grpc, ALONE) as channel,
        grpc.aio.insecure_channel(keyed.grpc, ALONE) as greedy,
    ):
        turns = keyed.patience.tenants.turns
        crowd = [greedy.stream_unary(GENERATE)(metadata=metadata) for _ in range(20 * patience.MOST_READING)]
        await until(lambda: turns.num_waiting > 10 * patience.MOST_READING)
        assert await answer(channel, "other") == 2
        assert turns.num_waiting > 5 * patience.MOST_READING  # it has not waited for all of them
        assert await slowly(channel, keyed, "other") == 2
        for call in crowd:
            call.cancel()


# --- reflection -----------------------------------------------------------------------------------------------------


def asked(name: str) -> reflection_pb2.ServerReflectionRequest:
    return reflection_pb2.ServerReflectionRequest(file_containing_symbol=name)


async def test_reflection_answers_one_message_after_the_other(live: LiveStack) -> None:
    async with grpc.aio.insecure_channel(live.grpc) as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(timeout=30)
        for _ in range(3):
            await call.write(asked("perseid.v1.Generation"))
            assert (await call.read()).file_descriptor_response.file_descriptor_proto
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK


async def test_a_message_of_a_stream_is_small(live: LiveStack) -> None:
    async with grpc.aio.insecure_channel(live.grpc) as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(timeout=30)
        await call.write(asked("perseid.v1.Generation"))
        assert (await call.read()).file_descriptor_response.file_descriptor_proto
        await call.write(asked("x" * 5000))
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "expected at most 4096" in await call.details()
        assert not live.stack.budget.num_bytes


async def test_who_does_not_read_what_reflection_tells_is_ended(
    live: LiveStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "STALL_TIMEOUT_S", 0.2)
    lazy = (*ALONE, ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16384))
    async with grpc.aio.insecure_channel(live.grpc, lazy) as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(timeout=60)
        await call.write(asked("perseid.v1.Generation"))
        assert (await call.read()).file_descriptor_response.file_descriptor_proto
        writing = asyncio.create_task(_ask_on(call))
        (record,) = live.stack.calls.open_calls
        await until(lambda: record.error is not None)
        assert (record.status, record.error) == ("RESOURCE_EXHAUSTED", "queue_full")
        call.cancel()
        await writing


async def _ask_on(call: grpc.aio.StreamStreamCall) -> None:
    """Without reading, until the call is ended."""
    with contextlib.suppress(asyncio.InvalidStateError, asyncio.CancelledError, grpc.aio.AioRpcError):
        while True:
            await call.write(asked("perseid.v1.Generation"))


async def test_a_stream_that_says_nothing_is_ended(live: LiveStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perseid_server.api.grpc.reading.MESSAGE_TIMEOUT_S", 0.1)
    async with grpc.aio.insecure_channel(live.grpc) as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(timeout=30)
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "message did not come within" in await call.details()

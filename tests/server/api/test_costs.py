"""What a key pays for a request that is not answered: nothing, over either way of answering, unless its client left."""

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
import pytest_asyncio

from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from perseid_server.access.keys import Allowance
from tests.server.access.rings import bearer, gate_of, key
from tests.server.frontend.test_deadline import exceeded, failures
from tests.server.stack import LiveStack, Stack, make_stack, until

BODY = {"model": "tiny", "prompt": "x" * 50, "max_tokens": 2}


@pytest.fixture
def stack(tmp_path) -> Stack:
    return make_stack(tmp_path, gate=gate_of(key("user", allowance=Allowance(tokens_per_minute=1000))))


async def cost_of(live: LiveStack, **changes: Any) -> tuple[str, int]:
    """The answer, and what the ledger says."""
    async with live.http() as client:
        told = await client.post("/v1/completions", json=BODY | changes, headers=bearer("user"))
    return told.text, live.stack.gate.limiter.ledger.used("user").total


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["x" * 50, ["x" * 50, "y" * 60]])
async def test_a_request_that_fails_before_its_first_token(live: LiveStack, stream: bool, prompt: Any) -> None:
    live.stack.engine.status = "restarting"
    text, cost = await cost_of(live, stream=stream, prompt=prompt)
    assert "the engine is restarting" in text
    assert cost == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_one_prompt_of_several_that_is_refused(live: LiveStack, stream: bool) -> None:
    text, cost = await cost_of(live, stream=stream, prompt=["x" * 50, "y" * 400])
    assert "prompt and completion together may have 256" in text
    assert cost == 0


async def test_an_answer_that_has_begun(live: LiveStack) -> None:
    posted = {"json": BODY | {"stream": True, "max_tokens": 200}, "headers": bearer("user")}
    live.stack.engine.hold_after(4)
    async with live.http() as client, client.stream("POST", "/v1/completions", **posted) as answer:
        pieces = answer.aiter_lines()
        await anext(pieces)
        live.stack.engine.die()
        assert "engine stopped" in "".join([piece async for piece in pieces])
    assert live.stack.gate.limiter.ledger.used("user").total > 50


# --- gRPC: the end of a call's time, which its client and the transport know as well as we do -------------------------

Ask = Callable[[float | None], Any]
MESSAGE = pb.GenerateRequest(prompt="x" * 50, sampling=pb.SamplingParams(max_tokens=200))
METADATA = (("authorization", "Bearer user"),)


@pytest_asyncio.fixture(params=["Generate", "GenerateStream"])
async def ask(request: pytest.FixtureRequest, live: LiveStack) -> AsyncIterator[Ask]:
    """Begins a call; what it returns can be awaited for the call's status, and cancelled."""
    async with grpc.aio.insecure_channel(live.grpc) as channel:
        method = getattr(stubs.GenerationStub(channel), request.param)
        yield lambda timeout_s: method(MESSAGE, metadata=METADATA, timeout=timeout_s)


@pytest.fixture
def line(live: LiveStack, caplog: pytest.LogCaptureFixture) -> Callable[[], Awaitable[dict[str, Any]]]:
    """The one line of the log, when the call is over."""
    caplog.set_level(logging.INFO)

    async def told() -> dict[str, Any]:
        await until(lambda: not live.stack.calls.open_calls)
        [only] = [record.fields for record in caplog.records if record.name == "perseid_server.calls"]
        return only

    return told


async def test_a_grpc_call_that_gives_up_in_the_queue(live: LiveStack, ask: Ask, line) -> None:
    live.stack.engine.hold()
    call = ask(0.1)
    await live.stack.engine.submissions(1)
    assert live.stack.gate.limiter.ledger.used("user").total == 50
    time.sleep(0.15)  # noqa: ASYNC251  when we look again the transport has ended the call: it comes before our timer
    assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    told = await line()
    assert (told["status"], told["error"]) == ("DEADLINE_EXCEEDED", "deadline_exceeded")
    assert live.stack.gate.limiter.ledger.used("user").total == 0
    assert exceeded(live.stack) == {"queue": 1}
    assert failures(live.stack) == {"deadline": 1}


async def test_a_grpc_client_that_cancels_pays_its_prompt(live: LiveStack, ask: Ask, line) -> None:
    live.stack.engine.hold()
    call = ask(100.0)
    await live.stack.engine.submissions(1)
    call.cancel()
    told = await line()
    assert (told["status"], told["error"]) == ("CANCELLED", "aborted")
    assert live.stack.gate.limiter.ledger.used("user").total == 50
    assert exceeded(live.stack) == {}
    assert failures(live.stack) == {"aborted": 1}


async def test_a_grpc_call_whose_time_ends_amid_its_answer_pays_for_it(live: LiveStack, ask: Ask, line) -> None:
    live.stack.engine.hold_after(6)
    call = ask(0.2)
    await until(lambda: live.stack.gate.limiter.ledger.used("user").total > 50)
    assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert (await line())["error"] == "deadline_exceeded"
    assert live.stack.gate.limiter.ledger.used("user").total > 50
    assert exceeded(live.stack) == {"running": 1}

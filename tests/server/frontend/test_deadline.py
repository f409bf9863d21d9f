"""Time that is over ends a request wherever it is, says so, and frees what it holds."""

import asyncio
import json
import math
import re
import threading
import time
from dataclasses import replace

import grpc
import pytest

from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from perseid_server.access.caller import Caller
from perseid_server.engine.messages import SequenceOutput
from perseid_server.errors import DeadlineExceeded, InvalidRequest
from perseid_server.frontend.adaptation_options import Named
from perseid_server.frontend.deadline import Deadline, Timeouts
from perseid_server.frontend.generation import Delta
from perseid_server.frontend.requests import GenerationRequest, SamplingOptions, TextInput
from perseid_server.observe.record import CallRecord
from tests.server.frontend.test_service import collect, is_free
from tests.server.stack import LiveStack, Stack, make_stack

BODY = {"model": "tiny", "prompt": "say", "max_tokens": 8}


def request(timeout_s: float | None = None, text: str = "say", **fields: object) -> GenerationRequest:
    options = SamplingOptions(max_tokens=8)
    return GenerationRequest("r", TextInput(text), sampling=options, timeout_s=timeout_s, **fields)


def exceeded(stack: Stack) -> dict[str, float]:
    found = re.findall(r'perseid_deadline_exceeded_total\{stage="(\w+)"} (\S+)', stack.metrics.render().decode())
    return {stage: float(count) for stage, count in found if float(count)}


def failures(stack: Stack) -> dict[str, float]:
    found = re.findall(r'perseid_request_failure_total\{kind="(\w+)"} (\S+)', stack.metrics.render().decode())
    return {kind: float(count) for kind, count in found if float(count)}


async def test_a_request_in_time_is_answered(stack: Stack) -> None:
    assert (await collect(stack, request(1000.0)))[0][-1].finish_reason == "length"
    assert exceeded(stack) == {}


async def test_the_engine_is_told_until_when_and_whose_it_is(stack: Stack) -> None:
    asked = request(50.0, caller=Caller("acme", weight=2.0))
    await collect(stack, asked)
    [told] = stack.engine.submitted
    assert told.deadline == asked.arrived + 50.0
    assert (told.tenant, told.weight, told.cache_salt) == ("acme", 2.0, "acme")
    await collect(stack, request())
    assert stack.engine.submitted[1].deadline is None


async def test_an_engine_that_hangs_is_not_waited_for(stack: Stack) -> None:
    await stack.load("one")
    stack.engine.hold()
    with pytest.raises(DeadlineExceeded, match=r"timeout: the request's 0.05 s were over before its first token"):
        await collect(stack, request(0.05, adaptation=Named("one")))
    assert is_free(stack)
    assert not stack.registry.leases.versions()
    assert stack.service._admission.in_progress == 0
    assert exceeded(stack) == {"queue": 1}


async def hold_after_first(stack: Stack, seen: list[Delta]) -> None:
    async with stack.service.generate(request(0.2)) as generation:
        async for delta in generation:
            seen.append(delta)
            stack.engine.hold()


async def test_time_that_is_over_amid_tokens(stack: Stack) -> None:
    seen: list[Delta] = []
    with pytest.raises(DeadlineExceeded, match="while it ran"):
        await hold_after_first(stack, seen)
    assert len(seen) == 1
    assert is_free(stack)
    assert exceeded(stack) == {"running": 1}


async def test_time_that_is_over_while_it_is_tokenized(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    encode = stack.service.text.tokenizer.encode_batch
    slow = type("Slow", (), {"encode_batch": lambda _, *a, **k: (go_on.wait(20), encode(*a, **k))[1]})()
    monkeypatch.setattr(stack.service.text, "tokenizer", slow)
    with pytest.raises(DeadlineExceeded, match="before its first token"):
        await collect(stack, request(0.05, "x" * 5000))
    assert stack.service._admission.in_progress == 0
    assert stack.service.text.tokenizing.characters == 5000  # the thread cannot be stopped
    go_on.set()
    async with asyncio.timeout(20):
        while stack.service.text.tokenizing.characters:  # noqa: ASYNC110  a thread ends, which sets no event
            await asyncio.sleep(0.001)
    assert not stack.engine.submitted


async def test_time_that_was_over_on_arrival(stack: Stack) -> None:
    late = replace(request(1.0), arrived=time.monotonic() - 2.0)
    with pytest.raises(DeadlineExceeded):
        await collect(stack, late)
    assert is_free(stack)


async def test_the_engine_says_that_the_time_is_over(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    async def submit(asked):
        yield SequenceOutput(asked.request_id, finish_reason="error", error="too late", error_kind="deadline")

    monkeypatch.setattr(stack.engine, "submit", submit)
    with pytest.raises(DeadlineExceeded):
        await collect(stack, request(1000.0))
    assert exceeded(stack) == {"queue": 1}


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, math.inf, math.nan])
async def test_what_is_no_time_is_refused(stack: Stack, timeout_s: float) -> None:
    with pytest.raises(InvalidRequest, match="expected a number of seconds above 0") as refused:
        await collect(stack, request(timeout_s))
    assert refused.value.field == "timeout"


@pytest.mark.parametrize(
    ("timeouts", "stated", "holds"),
    [
        (Timeouts(), None, None),
        (Timeouts(), 5.0, 5.0),
        (Timeouts(default_s=3.0), None, 3.0),
        (Timeouts(default_s=3.0), 5.0, 5.0),
        (Timeouts(longest_s=4.0), None, 4.0),
        (Timeouts(longest_s=4.0), 5.0, 4.0),
        (Timeouts(default_s=9.0, longest_s=4.0), None, 4.0),
    ],
)
def test_what_the_operator_sets(timeouts: Timeouts, stated: float | None, holds: float | None) -> None:
    assert timeouts.of(stated) == holds


async def test_the_operators_default_ends_a_request(tmp_path) -> None:
    stack = make_stack(tmp_path, timeouts=Timeouts(default_s=0.05))
    stack.engine.hold()
    with pytest.raises(DeadlineExceeded):
        await collect(stack, request())


async def test_over_http_it_is_408_and_an_event_in_a_stream(live: LiveStack) -> None:
    live.stack.engine.hold()
    async with live.http() as client:
        whole = await client.post("/v1/completions", json=BODY | {"timeout": 0.05})
        assert (whole.status_code, whole.json()["error"]["type"]) == (408, "timeout_error")
        streamed = await client.post("/v1/completions", json=BODY | {"timeout": 0.05, "stream": True})
        *_, event, done = [line for line in streamed.text.split("\n\n") if line]
        assert json.loads(event.removeprefix("data: "))["error"]["type"] == "timeout_error"
        assert done == "data: [DONE]"
        for wrong in (0, -1, "soon", True):
            assert (await client.post("/v1/completions", json=BODY | {"timeout": wrong})).status_code == 400
    assert is_free(live.stack)


async def test_a_grpc_deadline_reaches_the_engine(live: LiveStack) -> None:
    async with grpc.aio.insecure_channel(live.grpc) as channel:
        before = time.monotonic()
        await stubs.GenerationStub(channel).Generate(pb.GenerateRequest(prompt="say"), timeout=100)
    [told] = live.stack.engine.submitted
    assert told.deadline is not None
    assert before + 90 < told.deadline < before + 110


async def test_a_timeout_of_the_works_own_is_not_the_deadlines() -> None:
    told: list[str] = []

    async def work() -> None:
        raise TimeoutError("the disk's")

    with pytest.raises(TimeoutError, match="the disk's"):
        await Deadline(time.monotonic(), 1000.0, told.append).within(work())
    assert not told


async def test_it_is_told_once_however_many_wait_for_it() -> None:
    told: list[str] = []
    deadline = Deadline(time.monotonic() - 10, 5.0, told.append)
    for _ in range(2):
        with pytest.raises(DeadlineExceeded), deadline.minded():
            await deadline.within(asyncio.sleep(1000))
    assert told == ["queue"]


# --- clients that give up at the same time, or leave before -----------------------------------------------------------


@pytest.mark.parametrize("leaving", [asyncio.CancelledError, GeneratorExit])
@pytest.mark.parametrize(
    ("timeout_s", "left_s", "is_late"),
    [(1.0, -0.5, True), (1.0, 0.004, True), (1000.0, 9.0, True), (1000.0, 11.0, False), (None, 0.0, False)],
)
def test_who_leaves_when_the_time_is_over_leaves_because_of_it(
    leaving: type[BaseException], timeout_s: float | None, left_s: float, is_late: bool
) -> None:
    told: list[str] = []
    arrived = time.monotonic() + left_s - (timeout_s or 0.0)
    with pytest.raises(leaving), Deadline(arrived, timeout_s, told.append).minded():
        raise leaving
    assert told == ["queue"] * is_late


async def leave_amid(stack: Stack, asked: GenerationRequest) -> None:
    async with stack.service.generate(asked) as generation:
        await anext(aiter(generation))
        raise asyncio.CancelledError


async def test_who_leaves_amid_an_answer_when_its_time_is_over(stack: Stack) -> None:
    call = CallRecord()
    late = replace(request(1000.0), arrived=time.monotonic() - 999.0, call=call)
    with pytest.raises(asyncio.CancelledError):
        await leave_amid(stack, late)
    assert exceeded(stack) == {"running": 1}
    assert failures(stack) == {"deadline": 1}
    assert (call.error, call.error_field) == ("deadline_exceeded", "timeout")


async def test_who_leaves_earlier_has_not_waited_for_it(stack: Stack) -> None:
    with pytest.raises(asyncio.CancelledError):
        await leave_amid(stack, request(1000.0))
    assert exceeded(stack) == {}
    assert failures(stack) == {"aborted": 1}


async def test_our_own_timer_counts_as_a_deadline_among_failures(stack: Stack) -> None:
    stack.engine.hold()
    with pytest.raises(DeadlineExceeded):
        await collect(stack, request(0.05))
    assert failures(stack) == {"deadline": 1}

"""The queue is bounded by requests and tokens; what is too much is refused at once and says when to come back."""

import asyncio
import contextlib
import re

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from perseid_server.access.caller import Caller
from perseid_server.errors import InvalidRequest, QueueFull
from perseid_server.frontend.admission import OPEN_ANSWER, Admission, AdmissionLimits
from perseid_server.frontend.drain_rate import DrainRate
from perseid_server.frontend.metrics import Metrics
from perseid_server.frontend.requests import GenerationRequest, SamplingOptions, TextInput, TokenInput
from tests.server.stack import Stack, make_stack, serving


def request(prompt: int = 3, tenant: str = "", **sampling: object) -> GenerationRequest:
    options = SamplingOptions(**({"max_tokens": 8} | sampling))
    return GenerationRequest("r", TokenInput((97,) * prompt), sampling=options, caller=Caller(tenant))


async def begin(stack: Stack, stay: contextlib.AsyncExitStack, asked: GenerationRequest) -> None:
    """Accepted, and not read: it stays in progress."""
    await stay.enter_async_context(stack.service.generate(asked))


def rejected(stack: Stack) -> dict[str, float]:
    found = re.findall(r'perseid_requests_rejected_total\{reason="(\w+)"} (\S+)', stack.metrics.render().decode())
    return {reason: float(count) for reason, count in found if float(count)}


async def test_tokens_count_the_prompt_and_what_each_answer_may_have(stack: Stack) -> None:
    admission = stack.service._admission
    async with contextlib.AsyncExitStack() as stay:
        await begin(stack, stay, request(10, n=3, max_tokens=20))
        assert (admission.in_progress, admission.tokens_in_progress) == (3, 70)
    assert (admission.in_progress, admission.tokens_in_progress) == (0, 0)


async def test_an_answer_of_open_length_counts_as_a_usual_one(tmp_path) -> None:
    stack = make_stack(tmp_path, max_model_len=2000)
    async with contextlib.AsyncExitStack() as stay:
        await begin(stack, stay, request(10, max_tokens=None))
        assert stack.service._admission.tokens_in_progress == 10 + OPEN_ANSWER


async def test_tokens_beyond_the_limit_are_refused_until_others_end(tmp_path) -> None:
    stack = make_stack(tmp_path, max_queue_tokens=100)
    async with contextlib.AsyncExitStack() as stay:
        await begin(stack, stay, request(40, max_tokens=20))
        with pytest.raises(QueueFull, match="60 tokens are in progress, the limit is 100") as full:
            await begin(stack, stay, request(40, max_tokens=20))
        assert 1.0 <= full.value.retry_after_s <= 60.0
        await begin(stack, stay, request(20, max_tokens=20))
        assert rejected(stack) == {"tokens": 1}
    async with contextlib.AsyncExitStack() as stay:
        await begin(stack, stay, request(40, max_tokens=20))


async def test_a_full_queue_refuses_before_it_tokenizes(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = make_stack(tmp_path, max_queue_tokens=11)
    async with contextlib.AsyncExitStack() as stay:
        await begin(stack, stay, request(3, max_tokens=8))
        monkeypatch.setattr(stack.service.text, "encode", None)
        with pytest.raises(QueueFull, match="11 tokens"):
            await begin(stack, stay, GenerationRequest("r", TextInput("x" * 100_000)))


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ({"max_queue": 5}, r"2 prompts make 6 answers or more, and 5 may be in progress at once \(--max-queue\)"),
        ({"max_queue_tokens": 53}, r"2 prompts make 54 tokens or more, and 53 .* \(--max-queue-tokens\)"),
    ],
    ids=["answers", "tokens"],
)
async def test_prompts_that_never_fit_together_are_not_told_to_come_back(tmp_path, limits: dict, told: str) -> None:
    stack = make_stack(tmp_path, **limits)
    with pytest.raises(InvalidRequest, match=told) as refused:
        async with stack.service.generate_all([request(3, n=3)] * 2):
            pass
    assert refused.value.field == "prompt"
    assert stack.service._admission.in_progress == 0
    stack = make_stack(tmp_path / "more", **{name: limit + 1 for name, limit in limits.items()})
    async with stack.service.generate_all([request(3, n=3)] * 2) as generations:
        assert len(generations) == 2


async def test_one_request_larger_than_the_limit_runs_alone(tmp_path) -> None:
    stack = make_stack(tmp_path, max_queue=2, max_queue_tokens=10)
    async with stack.service.generate(request(50, n=5, max_tokens=20)) as generation:
        assert [delta async for delta in generation]


async def flood(stack: Stack, stay: contextlib.AsyncExitStack, one: GenerationRequest) -> None:
    for _ in range(1000):
        await begin(stack, stay, one)


async def test_a_flood_of_one_tenant_turns_no_other_away(tmp_path) -> None:
    stack = make_stack(tmp_path, max_queue=50)
    async with contextlib.AsyncExitStack() as stay:
        with pytest.raises(QueueFull, match="tenant has its share of the requests"):
            await flood(stack, stay, request(tenant="flood"))
        for _ in range(5):
            await begin(stack, stay, request(tenant="other"))


async def test_a_tenants_flood_of_tokens_turns_no_other_away(tmp_path) -> None:
    stack = make_stack(tmp_path, max_queue_tokens=1000)
    async with contextlib.AsyncExitStack() as stay:
        with pytest.raises(QueueFull, match="tenant has its share of the tokens"):
            await flood(stack, stay, request(20, tenant="flood"))
        await begin(stack, stay, request(20, tenant="other"))


def test_the_usual_limit_follows_from_the_cache() -> None:
    assert AdmissionLimits.of(5, None, 8192) == AdmissionLimits(5, 131_072)
    assert AdmissionLimits.of(5, 7, 8192) == AdmissionLimits(5, 7)


def test_a_refusal_counts_nothing() -> None:
    admission = Admission(AdmissionLimits(1, 100), Metrics(1))
    with admission.enter(Caller(), 1):
        with pytest.raises(QueueFull), admission.enter(Caller(), 1):
            pass
        assert admission.in_progress == 1
    assert admission.in_progress == 0


async def test_both_transports_say_when_to_come_back(tmp_path) -> None:
    stack = make_stack(tmp_path, max_queue=1)
    async with serving(stack) as live, live.http() as client, grpc.aio.insecure_channel(live.grpc) as channel:
        stack.engine.hold()
        body = {"model": "tiny", "prompt": "say"}
        first = asyncio.create_task(client.post("/v1/completions", json=body))
        await stack.engine.submissions(1)
        refused = await client.post("/v1/completions", json=body)
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(refused.headers["Retry-After"]) <= 60
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stubs.GenerationStub(channel).Generate(pb.GenerateRequest(prompt="say"))
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        retry = error_details_pb2.RetryInfo()
        status = rpc_status.from_call(error.value)
        assert status is not None
        assert status.details[0].Unpack(retry)
        assert 1.0 <= retry.retry_delay.ToTimedelta().total_seconds() <= 60.0
        stack.engine.go_on()
        assert (await first).status_code == 200


def test_what_has_left_shortens_the_time_until_the_next_try() -> None:
    rate = DrainRate(clock=lambda: 0.0, draw=lambda: 0.5)
    admission = Admission(AdmissionLimits(10, 1000), Metrics(8), rate)
    with admission.enter(Caller(), 1) as place:
        place.count_tokens(100)
        assert rate.tokens_per_s == 0.0
    assert rate.tokens_per_s > 0.0
    with admission.enter(Caller(), 1) as place:
        place.count_tokens(500)
        assert admission.retry_after_s() == rate.retry_after_s(500)


def test_the_rate_counts_only_time_with_something_in_progress() -> None:
    now = [100.0]
    rate = DrainRate(lambda: now[0], lambda: 0.5)
    admission = Admission(AdmissionLimits(4, 1000), Metrics(8), rate)
    with admission.enter(Caller(), 1), admission.enter(Caller(), 1) as place:
        place.count_tokens(100)
        now[0] += 5.0
    before = rate.tokens_per_s
    assert before > 0
    now[0] += 600.0
    assert rate.tokens_per_s == before
    with admission.enter(Caller(), 1):
        with admission.enter(Caller(), 1):
            pass  # the other is in progress still
        now[0] += 600.0
        assert rate.tokens_per_s < 0.01 * before

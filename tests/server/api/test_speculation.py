"""What a client says and sees of drafting: the same on both transports, and OpenAI's client reads all of it."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
import pytest_asyncio

from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from perseid_server.engine.adaptation import Adaptation
from perseid_server.frontend.speculation import Drafting
from perseid_server.speculation.options import Speculation
from tests.server.stack import LiveStack, make_stack, serving

CHAT: list[dict[str, str]] = [{"role": "user", "content": "hi"}]
SAID = "one two three"
COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": "say", "max_tokens": 20}
LOSSY = {"acceptance": "typical", "lossy": True}


@dataclass(frozen=True)
class BaseHeads:
    """Heads of the base."""

    version: str = "h"

    def heads_for(self, adaptation: Adaptation) -> "BaseHeads":
        return self


@pytest_asyncio.fixture
async def drafting(tmp_path) -> AsyncIterator[LiveStack]:
    """A server with heads whose outputs bring four and two tokens in turn."""
    stack = make_stack(tmp_path, drafting=Drafting(BaseHeads()))
    stack.engine.sizes = (4, 2)
    stack.says(SAID)
    async with serving(stack) as live:
        yield live


@pytest_asyncio.fixture
async def generation(drafting: LiveStack) -> AsyncIterator[stubs.GenerationStub]:
    async with grpc.aio.insecure_channel(drafting.grpc) as channel:
        yield stubs.GenerationStub(channel)


def request(sampling: dict[str, Any] | None = None, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt="say", sampling=pb.SamplingParams(max_tokens=20, **(sampling or {})), **fields)


FIELDS: list[tuple[dict[str, Any], dict[str, Any], Speculation]] = [
    ({}, {}, Speculation("auto", "h")),
    ({"speculation": None, "acceptance": None, "typical": None}, {}, Speculation("auto", "h")),
    ({"speculation": "auto"}, {"speculation": pb.SPECULATION_AUTO}, Speculation("auto", "h")),
    ({"speculation": "medusa"}, {"speculation": pb.SPECULATION_MEDUSA}, Speculation("medusa", "h")),
    ({"speculation": "ngram"}, {"speculation": pb.SPECULATION_NGRAM}, Speculation("ngram")),
    ({"speculation": "off"}, {"speculation": pb.SPECULATION_OFF}, Speculation("off")),
    ({"acceptance": "exact"}, {"acceptance": pb.ACCEPTANCE_EXACT}, Speculation("auto", "h")),
    ({"acceptance": "typical"}, {"acceptance": pb.ACCEPTANCE_TYPICAL}, Speculation("auto", "h", "typical")),
    (
        {"acceptance": "typical", "typical": {"epsilon": 0.2}},
        {"acceptance": pb.ACCEPTANCE_TYPICAL, "typical": pb.Typical(epsilon=0.2)},
        Speculation("auto", "h", "typical", 0.2),
    ),
    (
        {"speculation": "ngram", "acceptance": "typical", "typical": {"epsilon": 1, "delta": 0.7}},
        {
            "speculation": pb.SPECULATION_NGRAM,
            "acceptance": pb.ACCEPTANCE_TYPICAL,
            "typical": pb.Typical(epsilon=1, delta=0.7),
        },
        Speculation("ngram", None, "typical", 1.0, 0.7),
    ),
]


@pytest.mark.parametrize(("body", "message", "asked"), FIELDS, ids=[str(body) for body, _, _ in FIELDS])
async def test_both_transports_ask_the_engine_for_the_same(
    drafting: LiveStack, generation: stubs.GenerationStub, body: dict, message: dict, asked: Speculation
) -> None:
    await drafting.openai().completions.create(**COMPLETION, extra_body=body)
    await drafting.openai().chat.completions.create(model="tiny", messages=CHAT, max_tokens=2, extra_body=body)
    await generation.Generate(request(**message))
    assert [submit.speculation for submit in drafting.stack.engine.submitted] == [asked] * 3


@pytest.mark.parametrize(("num_tokens", "accepted", "rejected"), [(20, 9, 9), (7, 4, 4)])
async def test_the_usage_tells_accepted_and_rejected_drafts(
    drafting: LiveStack, generation: stubs.GenerationStub, num_tokens: int, accepted: int, rejected: int
) -> None:
    """Outputs of 4, 2, 4, 2 and 1 tokens and the end: all tokens but the last of each had been drafted."""
    asked = COMPLETION | {"max_tokens": num_tokens}
    usages = [(await drafting.openai().completions.create(**asked)).usage]
    stream = await drafting.openai().completions.create(**asked, stream=True, stream_options={"include_usage": True})
    usages += [chunk.usage async for chunk in stream if chunk.usage]
    for usage in usages:
        details = usage.completion_tokens_details
        assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (accepted, rejected)
        assert usage.completion_tokens == min(num_tokens, len(SAID))
    message = request()
    message.sampling.max_tokens = num_tokens
    told = (await generation.Generate(message)).usage
    last = [chunk async for chunk in generation.GenerateStream(message)][-1].usage
    assert told == last
    assert (told.accepted_draft_tokens, told.rejected_draft_tokens) == (accepted, rejected)


async def test_drafts_of_all_choices_and_prompts_are_counted(drafting: LiveStack) -> None:
    told = await drafting.openai().completions.create(**COMPLETION | {"prompt": ["a", "b"], "n": 2})
    assert told.usage.completion_tokens_details.accepted_prediction_tokens == 4 * 9


async def test_without_drafts_none_are_counted(live: LiveStack) -> None:
    told = await live.openai().chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=4, extra_body={"speculation": "off"}
    )
    details = told.usage.completion_tokens_details
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (0, 0)


async def test_a_stream_has_a_chunk_for_each_step_with_its_tokens_and_their_logprobs(drafting: LiveStack) -> None:
    stream = await drafting.openai().completions.create(**COMPLETION, stream=True, logprobs=1)
    chunks = [chunk.choices[0] async for chunk in stream]
    assert [chunk.text for chunk in chunks] == ["one ", "tw", "o th", "re", "e"]
    assert ["".join(chunk.logprobs.tokens) for chunk in chunks] == [chunk.text for chunk in chunks]
    assert [chunk.logprobs.text_offset for chunk in chunks] == [
        [0, 1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11], [12]
    ]  # fmt: skip
    assert [chunk.finish_reason for chunk in chunks] == [None] * 4 + ["stop"]


async def test_a_streamed_conversation_tells_each_token_of_a_step(drafting: LiveStack) -> None:
    stream = await drafting.openai().chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=20, stream=True, logprobs=True, top_logprobs=1, stop=["thr"]
    )
    chunks = [chunk.choices[0] async for chunk in stream]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "one two "
    tokens = [[token.token for token in chunk.logprobs.content] for chunk in chunks if chunk.logprobs]
    assert tokens == [list("one "), list("tw"), list("o th"), ["r"]], "as far as the stop text"
    assert chunks[-1].finish_reason == "stop"


async def test_a_grpc_message_brings_all_tokens_of_a_step(generation: stubs.GenerationStub) -> None:
    asked = request({"logprobs": 0, "stop": ["thr"], "n": 2})
    whole = await generation.Generate(asked)
    chunks = [chunk async for chunk in generation.GenerateStream(asked)]
    for choice in whole.choices:
        mine = [chunk for chunk in chunks if chunk.index == choice.index]
        assert [bytes(chunk.token_ids) for chunk in mine] == [b"one ", b"tw", b"o th", b"r"]
        assert all([told.token_id for told in chunk.logprobs] == list(chunk.token_ids) for chunk in mine)
        assert "".join(chunk.text for chunk in mine) == choice.text == "one two "
        assert [told for chunk in mine for told in chunk.logprobs] == list(choice.logprobs)
    assert (whole.usage.completion_tokens, whole.usage.accepted_draft_tokens) == (2 * 11, 2 * (3 + 1 + 3 + 1))


async def test_typical_acceptance_is_told_as_lossy_in_answers(
    drafting: LiveStack, generation: stubs.GenerationStub
) -> None:
    client, body = drafting.openai(), {"acceptance": "typical"}
    completion = await client.completions.create(**COMPLETION, extra_body=body)
    chat = await client.chat.completions.create(model="tiny", messages=CHAT, extra_body=body)
    assert completion.perseid["speculation"] == chat.perseid["speculation"] == LOSSY
    told = await generation.Generate(request(acceptance=pb.ACCEPTANCE_TYPICAL))
    assert told.speculation == pb.SpeculationReport(acceptance=pb.ACCEPTANCE_TYPICAL, lossy=True)


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": True}}], ids=["plain", "with usage"])
async def test_typical_acceptance_is_told_as_lossy_in_the_last_chunk(
    drafting: LiveStack, generation: stubs.GenerationStub, options: dict
) -> None:
    stream = await drafting.openai().completions.create(
        **COMPLETION, stream=True, **options, extra_body={"acceptance": "typical"}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].perseid["speculation"] == LOSSY
    assert not any(hasattr(chunk, "perseid") for chunk in chunks[:-1])
    told = [chunk async for chunk in generation.GenerateStream(request(acceptance=pb.ACCEPTANCE_TYPICAL))]
    assert [chunk.HasField("speculation") for chunk in told] == [False] * (len(told) - 1) + [True]
    assert told[-1].speculation.lossy


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, {}),
        ({"acceptance": "exact"}, {"acceptance": pb.ACCEPTANCE_EXACT}),
        (
            {"acceptance": "typical", "speculation": "off"},
            {"acceptance": pb.ACCEPTANCE_TYPICAL, "speculation": pb.SPECULATION_OFF},
        ),
        (
            {"acceptance": "typical", "temperature": 0},
            {"acceptance": pb.ACCEPTANCE_TYPICAL, "sampling": {"temperature": 0}},
        ),
    ],
    ids=["default", "exact", "off", "greedy"],
)
async def test_nothing_is_told_of_answers_that_drafts_cannot_change(
    drafting: LiveStack, generation: stubs.GenerationStub, body: dict, message: dict
) -> None:
    told = await drafting.openai().completions.create(**COMPLETION, extra_body=body)
    assert "speculation" not in told.perseid
    stream = await drafting.openai().completions.create(**COMPLETION, stream=True, extra_body=body)
    assert all(chunk.choices for chunk in [chunk async for chunk in stream])
    assert not (await generation.Generate(request(**message))).HasField("speculation")


async def test_heads_that_are_not_there_are_refused_in_the_same_words(live: LiveStack) -> None:
    async with live.http() as http, grpc.aio.insecure_channel(live.grpc) as channel:
        response = await http.post("/v1/completions", json=COMPLETION | {"speculation": "medusa"})
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stubs.GenerationStub(channel).Generate(request(speculation=pb.SPECULATION_MEDUSA))
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "speculation")
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error["message"] == refused.value.details()
    assert "perseid adapters load" in error["message"]


async def test_an_unknown_word_is_refused_with_the_known_ones_on_both(live: LiveStack) -> None:
    async with live.http() as http, grpc.aio.insecure_channel(live.grpc) as channel:
        response = await http.post("/v1/completions", json=COMPLETION | {"speculation": "9"})
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stubs.GenerationStub(channel).Generate(request(speculation=9))
    assert response.json()["error"]["message"] == refused.value.details()
    assert '"auto", "medusa", "ngram", "off"' in refused.value.details()

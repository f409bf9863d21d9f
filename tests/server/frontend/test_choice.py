"""Several tokens in one output give what they give one by one, and end where those would end."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from perseid_server.engine.messages import ErrorKind, RoutingReport, SequenceOutput
from perseid_server.errors import DeadlineExceeded, GenerationFailed, PerseidError, Unavailable
from perseid_server.frontend.adaptation import Resolved
from perseid_server.frontend.choice import Choice
from perseid_server.frontend.generation import Delta, Generation, Usage
from perseid_server.frontend.metrics import Metrics
from perseid_server.frontend.requests import GenerationRequest, SamplingOptions, TextInput
from perseid_server.frontend.routing_report import RoutingTally
from perseid_server.frontend.text import TextProcessor
from perseid_server.model.sampling_params import TokenLogprobs
from tests.fake_drafting import joined
from tests.fakes import EOS, VOCAB_SIZE, byte_bundle

TEXT = TextProcessor(byte_bundle(), VOCAB_SIZE)
PROMPT = tuple(b"say")
NAMES = ("a", "b")


@dataclass
class Run:
    """What came of one choice."""

    deltas: list[Delta]
    usage: Usage
    routing: RoutingTally
    metrics: Metrics

    def sample(self, name: str) -> float | None:
        """What the metrics tell."""
        return self.metrics.registry.get_sample_value(f"perseid_{name}")

    @property
    def answer(self) -> tuple[object, ...]:
        """All that a client is told in the end, but for what was drafted."""
        told = [delta for delta in self.deltas if not delta.is_prompt]
        return (
            "".join(delta.text for delta in self.deltas),
            tuple(token for delta in told for token in delta.token_ids),
            tuple(logprob for delta in told for logprob in delta.logprobs),
            tuple(shares for delta in told for shares in delta.routing),
            (self.deltas[-1].finish_reason, self.deltas[-1].stop_reason),
            (self.usage.prompt_tokens, self.usage.completion_tokens),
            (self.routing.prompt, self.routing.completion if self.routing.num_tokens else ()),
            self.sample("generation_tokens_total"),
        )


async def nothing() -> AsyncIterator[Delta]:
    """The deltas of a generation whose choice is run by itself."""
    return
    yield


def run(outputs: Sequence[SequenceOutput], **sampling: object) -> Run:
    """A choice over these outputs."""

    async def stream() -> AsyncIterator[SequenceOutput]:
        for output in outputs:
            yield output

    async def collect() -> list[Delta]:
        choice = Choice(generation, 0, "id#0", stream(), TEXT, metrics)
        return [delta async for delta in choice.deltas()]

    options = SamplingOptions(**sampling)  # type: ignore[arg-type]
    request = GenerationRequest("r", TextInput("say"), sampling=options, report="tokens")
    routing = RoutingTally(NAMES, "tiny")
    generation = Generation(request, Resolved(), PROMPT, nothing(), routing=routing)
    metrics = Metrics(8)
    deltas = asyncio.run(collect())
    return Run(deltas, generation.usage, routing, metrics)


def one_by_one(tokens: bytes, finish: str = "length") -> list[SequenceOutput]:
    """What an engine that drafts nothing sends. "end": the model's end token; "token": a stop token."""
    outputs = [
        SequenceOutput(
            "r",
            (token,),
            (TokenLogprobs(token, -0.5 - place, 1),),
            routing=RoutingReport((0.5, 0.5) if place == 0 else None, ((place / 64, 1 - place / 64),)),
            prompt_logprobs=(None, *(TokenLogprobs(prompt, -1.0, 1) for prompt in PROMPT[1:])) if place == 0 else None,
            finish_reason="length" if finish == "length" and place == len(tokens) - 1 else None,
        )
        for place, token in enumerate(tokens)
    ]
    if finish == "length":
        return outputs
    return [*outputs, SequenceOutput("r", finish_reason="stop", stop_token_id=EOS if finish == "end" else ord("z"))]


def split(outputs: Sequence[SequenceOutput], sizes: Sequence[int]) -> list[SequenceOutput]:
    """The same in outputs of these sizes, over and over."""
    told, place, turn = [], 0, 0
    while place < len(outputs):
        size = sizes[turn % len(sizes)]
        told.append(joined(outputs[place : place + size]))
        place, turn = place + size, turn + 1
    return told


TOKENS = st.lists(st.sampled_from(list("abc#é👋".encode())), min_size=1, max_size=24).map(bytes)
STOPS = st.lists(st.text("abc#é", min_size=1, max_size=3), max_size=3).map(tuple)


@given(
    tokens=TOKENS,
    finish=st.sampled_from(["length", "end", "token"]),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    stops=STOPS,
    keep=st.booleans(),
    echo=st.booleans(),
)
@example(tokens=b"ab##c", finish="length", sizes=[5], stops=("##",), keep=True, echo=False)
@example(tokens="a👋".encode(), finish="end", sizes=[3, 2], stops=("\ufffd",), keep=False, echo=True)
@settings(deadline=None)
def test_any_split_into_outputs_gives_the_same_answer(
    tokens: bytes, finish: str, sizes: list[int], stops: tuple[str, ...], keep: bool, echo: bool
) -> None:
    options = {"stop": stops, "stop_token_ids": (ord("z"),), "include_stop_str_in_output": keep, "echo": echo}
    outputs = one_by_one(tokens, finish)
    assert run(split(outputs, sizes), **options).answer == run(outputs, **options).answer


@pytest.mark.parametrize(("keep", "text"), [(False, "a"), (True, "a##")])
def test_a_stop_text_in_the_middle_of_an_output_ends_the_answer_there(keep: bool, text: str) -> None:
    told = run(split(one_by_one(b"xya##bcd"), [4]), stop=("##",), include_stop_str_in_output=keep)
    assert "".join(delta.text for delta in told.deltas) == "xy" + text
    assert [delta.token_ids for delta in told.deltas] == [tuple(b"xya#"), tuple(b"#")]
    assert [[one.logprob for one in delta.logprobs] for delta in told.deltas] == [[-0.5, -1.5, -2.5, -3.5], [-4.5]]
    assert told.deltas[1].routing == ((("b", 1 - 4 / 64), ("a", 4 / 64)),)
    assert (told.deltas[-1].finish_reason, told.deltas[-1].stop_reason) == ("stop", "##")
    assert (told.usage.completion_tokens, told.routing.num_tokens, told.sample("generation_tokens_total")) == (5, 5, 5)


def test_drafts_behind_a_stop_text_are_not_accepted() -> None:
    outputs = split(one_by_one(b"ab##cdef"), [8])  # 14 drafts of which 7 were accepted, all tokens but the last
    whole, stopped = run(outputs).usage, run(outputs, stop=("##",)).usage
    assert (whole.completion_tokens, whole.accepted_tokens, whole.rejected_tokens) == (8, 7, 7)
    assert (stopped.completion_tokens, stopped.accepted_tokens, stopped.rejected_tokens) == (4, 4, 10)


def test_text_comes_once_for_an_output_and_only_whole_characters() -> None:
    told = run(split(one_by_one("a👋é".encode()), [3]))
    assert [(delta.text, len(delta.token_ids)) for delta in told.deltas] == [("a", 3), ("👋", 3), ("é", 1)]


def test_the_echo_comes_first_and_takes_no_place_among_the_tokens() -> None:
    told = run(split(one_by_one(b"abc"), [3]), echo=True)
    assert [(delta.is_prompt, delta.text, delta.token_ids) for delta in told.deltas] == [
        (True, "say", PROMPT), (False, "abc", tuple(b"abc"))
    ]  # fmt: skip
    assert len(told.deltas[0].logprobs) == 3


def test_gaps_are_counted_by_output_and_time_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 1.5, 2.0])  # of outputs of 2, 3 and 1 tokens
    monkeypatch.setattr("perseid_server.frontend.metrics.requests.monotonic", lambda: next(clock))
    told = run(split(one_by_one(b"abcdef"), [2, 3]))
    assert told.sample("inter_token_latency_seconds_count") == 2
    assert told.sample("inter_token_latency_seconds_sum") == 1.0
    assert told.sample("request_time_per_output_token_seconds_sum") == 1.0 / 5
    assert told.sample("request_generation_tokens_sum") == 6


@pytest.mark.parametrize(
    ("kind", "error"), [("failed", GenerationFailed), ("unavailable", Unavailable), ("deadline", DeadlineExceeded)]
)
def test_an_answer_that_the_engine_ends_says_whether_to_try_again(kind: ErrorKind, error: type[PerseidError]) -> None:
    with pytest.raises(error, match="no luck"):
        run([SequenceOutput("r", finish_reason="error", error="no luck", error_kind=kind)])

"""A call in, text deltas out: stops, choices, echo, limits, and what happens when someone leaves or dies."""

import asyncio
import contextlib
import math

import pytest

from perseid_server.errors import GenerationFailed, InvalidRequest, NotFound, QueueFull, Unavailable
from perseid_server.frontend.adaptation_options import Named
from perseid_server.frontend.generation import Delta, Generation
from perseid_server.frontend.requests import GenerationRequest, SamplingOptions, TextInput, TokenInput
from tests.fakes import EOS, expected
from tests.server.stack import Stack, make_stack

PROMPT = "say"


def request(text: str = PROMPT, adapter: str | None = None, name: str = "r", **sampling) -> GenerationRequest:
    adaptation = Named(adapter) if adapter else None
    return GenerationRequest(name, TextInput(text), adaptation, SamplingOptions(**{"max_tokens": 8} | sampling))


async def collect(stack: Stack, asked: GenerationRequest) -> tuple[list[Delta], Generation]:
    async with stack.service.generate(asked) as generation:
        return [delta async for delta in generation], generation


def text_of(deltas: list[Delta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)


def is_free(stack: Stack) -> bool:
    """Nothing is left of any request."""
    return not stack.engine.engine.has_work and stack.engine.engine.stats().kv_blocks_used == 0


async def test_an_answer_ends_by_length_with_its_usage(stack: Stack) -> None:
    deltas, generation = await collect(stack, request())
    tokens = expected(tuple(PROMPT.encode()), None, 8)
    assert text_of(deltas) == bytes(tokens).decode()
    assert tuple(token for delta in deltas for token in delta.token_ids) == tokens
    assert [delta.finish_reason for delta in deltas] == [None] * 7 + ["length"]
    assert (generation.usage.prompt_tokens, generation.usage.completion_tokens) == (3, 8)


async def test_the_models_end_token_ends_an_answer_without_a_stop_reason(stack: Stack) -> None:
    stack.says("hé!")
    deltas, generation = await collect(stack, request())
    assert (text_of(deltas), deltas[-1].finish_reason, deltas[-1].stop_reason) == ("hé!", "stop", None)
    assert generation.usage.completion_tokens == 4


async def test_ignore_eos_goes_on(stack: Stack) -> None:
    stack.says("hi")
    deltas, _ = await collect(stack, request(ignore_eos=True, skip_special_tokens=False, max_tokens=3))
    assert text_of(deltas) == "hi<end>"


@pytest.mark.parametrize("sizes", [(1,), (3,), (4, 9)], ids=str)
@pytest.mark.parametrize(("keep", "text"), [(False, "one "), (True, "one two")])
async def test_a_stop_text_ends_the_answer_and_frees_the_engine(
    stack: Stack, keep: bool, text: str, sizes: tuple[int, ...]
) -> None:
    stack.engine.sizes = sizes
    stack.says("one two three")
    deltas, _ = await collect(stack, request(stop=("two", "ree"), max_tokens=20, include_stop_str_in_output=keep))
    assert text_of(deltas) == text
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "two")
    assert len(stack.engine.aborted) == 1
    assert is_free(stack)


async def test_no_delta_holds_the_beginning_of_the_stop_text(stack: Stack) -> None:
    stack.says("a<b<|end|>c")
    deltas, _ = await collect(stack, request(stop=("<|end|>",), max_tokens=20))
    assert [delta.text for delta in deltas if delta.text] == ["a", "<b"]


async def test_a_stop_token_ends_the_answer_and_is_told(stack: Stack) -> None:
    stack.says("abc")
    deltas, _ = await collect(stack, request(stop_token_ids=(ord("c"),)))
    assert (text_of(deltas), deltas[-1].finish_reason, deltas[-1].stop_reason) == ("ab", "stop", ord("c"))


async def test_text_held_back_comes_out_when_the_length_is_reached(stack: Stack) -> None:
    stack.says("abc##")
    deltas, _ = await collect(stack, request(stop=("###",), max_tokens=5))
    assert (text_of(deltas), deltas[-1].finish_reason) == ("abc##", "length")


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**64 - 1])
async def test_several_choices_come_with_their_numbers_and_seeds(stack: Stack, seed: int) -> None:
    deltas, generation = await collect(stack, request(n=3, seed=seed))
    assert [sum(delta.finish_reason is not None for delta in deltas if delta.index == i) for i in range(3)] == [1, 1, 1]
    assert generation.usage.completion_tokens == 24
    seeds = [submit.sampling.seed for submit in stack.engine.submitted]
    assert len(set(seeds)) == 3
    assert all(seed is not None and 0 <= seed < 2**64 for seed in seeds)


@pytest.mark.parametrize("max_tokens", [0, 2])
async def test_echo_puts_the_prompt_first(stack: Stack, max_tokens: int) -> None:
    deltas, generation = await collect(stack, request(echo=True, logprobs=0, max_tokens=max_tokens))
    assert (deltas[0].is_prompt, deltas[0].text) == (True, PROMPT)
    assert deltas[0].logprobs[0] is None
    assert len(deltas[0].logprobs) == len(deltas[0].token_ids) == 3
    answer = bytes(expected(tuple(PROMPT.encode()), None, max_tokens)).decode()
    assert text_of(deltas) == PROMPT + answer
    assert deltas[-1].finish_reason == "length"
    assert generation.usage.completion_tokens == max_tokens


async def test_every_token_has_its_log_probability_when_asked(stack: Stack) -> None:
    deltas, _ = await collect(stack, request(logprobs=2))
    told = [logprob for delta in deltas for logprob in delta.logprobs]
    assert [logprob.token_id for logprob in told] == [token for delta in deltas for token in delta.token_ids]
    assert all(len(logprob.top) == 2 for logprob in told)


async def test_an_adapter_answers_under_its_version(stack: Stack) -> None:
    version = await stack.load("one")
    deltas, generation = await collect(stack, request(adapter="one"))
    assert generation.adapter is not None
    assert generation.adapter.version == version
    assert text_of(deltas) == bytes(expected(tuple(PROMPT.encode()), version, 8)).decode()


async def test_a_request_ends_on_the_version_it_began_with(stack: Stack) -> None:
    version = await stack.load("one", seed=1)
    async with stack.service.generate(request(adapter="one")) as generation:
        deltas = [await anext(aiter(generation))]
        await stack.load("one", seed=2, replace=True)
        await stack.registry.unload("one")
        deltas += [delta async for delta in generation]
    assert text_of(deltas) == bytes(expected(tuple(PROMPT.encode()), version, 8)).decode()


async def test_an_unknown_adapter_is_not_found(stack: Stack) -> None:
    with pytest.raises(NotFound, match="no adapter 'nobody' is loaded"):
        await collect(stack, request(adapter="nobody"))


@pytest.mark.parametrize(("length", "max_tokens"), [(16, None), (17, None), (300, 1)])
async def test_a_prompt_longer_than_the_context_names_both_numbers(
    tmp_path, length: int, max_tokens: int | None
) -> None:
    stack = make_stack(tmp_path, max_model_len=16)
    with pytest.raises(InvalidRequest) as refused:
        await collect(stack, request("x" * length, max_tokens=max_tokens))
    assert refused.value.field == "prompt"
    assert str(length) in refused.value.message
    assert "16" in refused.value.message


async def test_more_tokens_than_the_context_has_room_for_name_all_numbers(tmp_path) -> None:
    stack = make_stack(tmp_path, max_model_len=16)
    with pytest.raises(InvalidRequest, match=r"max_tokens is 14 and the prompt has 3 tokens.* 16"):
        await collect(stack, request(max_tokens=14))
    assert len((await collect(stack, request(max_tokens=13)))[0]) == 13


async def test_without_max_tokens_the_answer_may_fill_the_context(tmp_path) -> None:
    stack = make_stack(tmp_path, max_model_len=16)
    deltas, generation = await collect(stack, request(max_tokens=None))
    assert generation.usage.completion_tokens == 13
    assert deltas[-1].finish_reason == "length"


@pytest.mark.parametrize("empty", [TextInput(""), TokenInput(())])
async def test_an_empty_prompt_is_refused(stack: Stack, empty) -> None:
    with pytest.raises(InvalidRequest, match="prompt: expected at least one token"):
        await collect(stack, GenerationRequest("r", empty))


async def test_what_is_refused_holds_nothing(stack: Stack) -> None:
    await stack.load("one")
    for _ in range(200):
        with pytest.raises(InvalidRequest):
            await collect(stack, request("x" * 1000, adapter="one"))
    assert not stack.registry.leases.versions()
    await stack.service.drain(math.inf)


async def test_leaving_early_frees_what_the_request_holds(stack: Stack) -> None:
    version = await stack.load("one")
    async with stack.service.generate(request(adapter="one", n=2)) as generation:
        await anext(aiter(generation))
    assert len(stack.engine.aborted) == 2
    assert is_free(stack)
    assert version not in stack.registry.leases


async def test_cancelling_frees_what_the_request_holds(stack: Stack) -> None:
    stack.engine.hold()
    task = asyncio.create_task(collect(stack, request()))
    await stack.engine.submissions(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(stack.engine.aborted) == 1
    assert is_free(stack)


async def test_requests_beyond_the_queue_are_refused_until_others_end(tmp_path) -> None:
    stack = make_stack(tmp_path, max_queue=2)
    stack.engine.hold()
    running = [asyncio.create_task(collect(stack, request(name=str(i)))) for i in range(2)]
    await stack.engine.submissions(2)
    with pytest.raises(QueueFull, match="2 requests are in progress, the limit is 2") as full:
        await collect(stack, request(name="third"))
    assert full.value.retry_after_s > 0
    stack.engine.go_on()
    await asyncio.gather(*running)
    await collect(stack, request(name="third"))


async def test_requests_with_one_id_at_once_do_not_meet(stack: Stack) -> None:
    stack.engine.hold()
    asked = [request(text, name="same") for text in ("first", "second")]
    running = [asyncio.create_task(collect(stack, one)) for one in asked]
    await stack.engine.submissions(2)
    stack.engine.go_on()
    for text, (deltas, generation) in zip(("first", "second"), await asyncio.gather(*running), strict=True):
        assert text_of(deltas) == bytes(expected(tuple(text.encode()), None, 8)).decode()
        assert generation.request.request_id == "same"


async def test_the_engines_death_ends_requests_in_flight_as_unavailable(stack: Stack) -> None:
    stack.engine.hold()
    running = [asyncio.create_task(collect(stack, request(name=str(i), n=1 + i))) for i in range(3)]
    await stack.engine.submissions(6)
    stack.engine.die()
    for task in running:
        with pytest.raises(Unavailable, match="the engine stopped"):
            await task
    with pytest.raises(Unavailable, match="the engine is restarting"):
        await collect(stack, request())


async def test_a_row_the_engine_gives_up_fails_alone(stack: Stack) -> None:
    stack.runner.choose = lambda adapter, tokens: expected(tokens, adapter, 1)[0]
    stack.engine.hold()
    running = [asyncio.create_task(collect(stack, request(name=name))) for name in ("good", "bad")]
    await stack.engine.submissions(2)
    stack.runner.nan_for.add(stack.engine.submitted[1].request_id)
    stack.engine.go_on()
    assert text_of((await running[0])[0])
    with pytest.raises(GenerationFailed, match="NaN"):
        await running[1]


async def test_draining_refuses_new_requests_and_waits_for_old_ones(stack: Stack) -> None:
    stack.engine.hold()
    running = asyncio.create_task(collect(stack, request()))
    await stack.engine.submissions(1)
    draining = asyncio.create_task(stack.service.drain(60))
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="shutting down"):
        await collect(stack, request())
    assert not draining.done()
    stack.engine.go_on()
    await asyncio.gather(running, draining)


async def test_draining_gives_up_after_the_grace_time(stack: Stack) -> None:
    stack.engine.hold()
    running = asyncio.create_task(collect(stack, request()))
    await stack.engine.submissions(1)
    await stack.service.drain(0.01)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


def test_the_end_token_is_part_of_what_the_engine_stops_at(stack: Stack) -> None:
    params = stack.service._sampling_params(SamplingOptions(stop_token_ids=(EOS, 7)), 3)
    assert params.stop_token_ids == (EOS, 7)
    assert stack.service._sampling_params(SamplingOptions(ignore_eos=True), 3).stop_token_ids == ()

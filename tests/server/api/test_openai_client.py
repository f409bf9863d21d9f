"""The official `openai` client, unchanged, against the real HTTP application."""

import asyncio

import openai
import pytest

from tests.fakes import expected
from tests.server.stack import LiveStack, make_stack, serving

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
COMPLETION = {"model": "tiny", "prompt": "say", "max_tokens": 6}


def answer(prompt: str, num_tokens: int, version: str | None = None) -> str:
    """What the fake model says."""
    return bytes(expected(tuple(prompt.encode()), version, num_tokens)).decode()


async def test_models_lists_the_base_first_then_the_adapters(live: LiveStack) -> None:
    version = await live.stack.load("one")
    models = (await live.openai().models.list()).data
    assert [(model.id, model.parent) for model in models] == [("tiny", None), ("one", "tiny")]
    assert models[1].root.endswith("one-0")
    assert (await live.openai().models.retrieve("one")).perseid["version"] == version
    assert (await live.openai().models.retrieve("tiny")).id == "tiny"


async def test_a_completion(live: LiveStack) -> None:
    told = await live.openai().completions.create(**COMPLETION)
    assert told.choices[0].text == answer("say", 6)
    assert (told.object, told.model, told.choices[0].finish_reason) == ("text_completion", "tiny", "length")
    assert (told.usage.prompt_tokens, told.usage.completion_tokens, told.usage.total_tokens) == (3, 6, 9)


@pytest.mark.parametrize(("prompt", "num_tokens"), [("say", 16), ("x" * 250, 6)])
async def test_without_max_tokens_a_completion_has_16_or_what_there_is_room_for(
    live: LiveStack, prompt: str, num_tokens: int
) -> None:
    told = await live.openai().completions.create(model="tiny", prompt=prompt)
    assert told.usage.completion_tokens == num_tokens


@pytest.mark.parametrize("model", ["one", "tiny:one"])
async def test_an_adapter_is_a_model(live: LiveStack, model: str) -> None:
    version = await live.stack.load("one")
    told = await live.openai().completions.create(**COMPLETION | {"model": model})
    assert told.choices[0].text == answer("say", 6, version)
    assert told.model == model
    assert told.perseid["adapter"] == {"name": "one", "version": version}


async def test_a_conversation(live: LiveStack) -> None:
    live.stack.says("Hello 👋!")
    told = await live.openai().chat.completions.create(model="tiny", messages=CHAT)
    assert told.choices[0].message.content == "Hello 👋!"
    assert (told.choices[0].message.role, told.choices[0].finish_reason) == ("assistant", "stop")
    assert told.usage.completion_tokens == len("Hello 👋!".encode())


async def test_content_parts_are_one_text(live: LiveStack) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    client = live.openai()
    for messages in (CHAT, [CHAT[0], {"role": "user", "content": parts}]):
        await client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=2)
    whole, in_parts = live.stack.engine.submitted
    assert whole.prompt_token_ids == in_parts.prompt_token_ids
    assert in_parts.sampling.max_tokens == 2


async def test_a_streamed_conversation_has_a_role_first_whole_characters_and_usage_last(live: LiveStack) -> None:
    live.stack.says("a👋é")
    stream = await live.openai().chat.completions.create(
        model="tiny", messages=CHAT, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content for chunk in chunks[1:-1] if chunk.choices[0].delta.content]
    assert texts == ["a", "👋", "é"]
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 7)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


async def test_a_streamed_completion_says_what_the_whole_one_says(live: LiveStack) -> None:
    client = live.openai()
    options = COMPLETION | {"n": 2, "stop": ["zz"], "logprobs": 1, "echo": True, "seed": 1}
    whole = await client.completions.create(**options)
    text, tokens, offsets = {0: "", 1: ""}, {0: [], 1: []}, {0: [], 1: []}
    async for chunk in await client.completions.create(**options, stream=True):
        choice = chunk.choices[0]
        text[choice.index] += choice.text
        if choice.logprobs:
            tokens[choice.index] += choice.logprobs.tokens
            offsets[choice.index] += choice.logprobs.text_offset
    for choice in whole.choices:
        assert text[choice.index] == choice.text
        assert tokens[choice.index] == choice.logprobs.tokens
        assert offsets[choice.index] == choice.logprobs.text_offset


async def test_logprobs_of_a_completion_have_a_place_for_each_token(live: LiveStack) -> None:
    live.stack.says("aé!b")
    told = await live.openai().completions.create(**COMPLETION | {"logprobs": 2, "echo": True})
    logprobs = told.choices[0].logprobs
    assert told.choices[0].text == "sayaé!b"
    assert logprobs.tokens == ["s", "a", "y", "a", "\ufffd", "\ufffd", "!", "b"]
    assert logprobs.text_offset == [0, 1, 2, 3, 4, 5, 5, 6]
    assert logprobs.token_logprobs == [None, -1.0, -1.0, -0.5, -0.5, -0.5, -0.5, -0.5]
    assert logprobs.top_logprobs[0] is None
    assert logprobs.top_logprobs[3] == {"a": -0.5, "b": -1.5}


async def test_offsets_do_not_wait_for_text_that_is_held_back(live: LiveStack) -> None:
    live.stack.says("ab##c")
    stream = await live.openai().completions.create(**COMPLETION | {"logprobs": 0, "stop": ["###"]}, stream=True)
    offsets = [chunk.choices[0].logprobs.text_offset async for chunk in stream if chunk.choices[0].logprobs]
    assert offsets == [[0], [1], [2], [3], [4]]


async def test_logprobs_of_a_conversation_tell_bytes(live: LiveStack) -> None:
    live.stack.says("é")
    told = await live.openai().chat.completions.create(model="tiny", messages=CHAT, logprobs=True, top_logprobs=1)
    content = told.choices[0].logprobs.content
    assert [token.bytes for token in content] == [[0xC3], [0xA9]]
    assert [token.top_logprobs[0].logprob for token in content] == [-0.5, -0.5]


@pytest.mark.parametrize("prompt", [["one", "two"], [[111, 110, 101], [116, 119, 111]]])
async def test_several_prompts_are_answered_in_order(live: LiveStack, prompt: list) -> None:
    told = await live.openai().completions.create(**COMPLETION | {"prompt": prompt, "n": 2})
    assert [choice.index for choice in told.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in told.choices] == [answer(text, 6) for text in ("one", "one", "two", "two")]
    assert (told.usage.prompt_tokens, told.usage.completion_tokens) == (6, 24)


async def test_a_stop_text_ends_an_answer_and_is_told(live: LiveStack) -> None:
    live.stack.says("one two three")
    told = await live.openai().completions.create(**COMPLETION | {"max_tokens": 20, "stop": [" t", "three"]})
    assert (told.choices[0].text, told.choices[0].finish_reason, told.choices[0].stop_reason) == ("one", "stop", " t")


async def test_errors_are_the_clients_own_exceptions(live: LiveStack) -> None:
    client = live.openai()
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.completions.create(**COMPLETION | {"model": "nobody"})
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model="tiny", messages=CHAT, temperature=-1)
    assert bad.value.param == "temperature"
    live.stack.engine.die()
    with pytest.raises(openai.InternalServerError) as down:
        await client.completions.create(**COMPLETION)
    assert down.value.status_code == 503
    assert int(down.value.response.headers["Retry-After"]) >= 1


async def test_a_full_queue_is_a_rate_limit_with_the_time_to_wait(tmp_path) -> None:
    stack = make_stack(tmp_path, max_queue=1)
    async with serving(stack) as live:
        stack.engine.hold()
        running = asyncio.create_task(live.openai().completions.create(**COMPLETION))
        await stack.engine.submissions(1)
        with pytest.raises(openai.RateLimitError) as full:
            await live.openai().completions.create(**COMPLETION)
        assert int(full.value.response.headers["Retry-After"]) >= 1
        stack.engine.go_on()
        assert (await running).choices[0].text == answer("say", 6)


async def test_the_engines_death_in_a_stream_is_an_error_the_client_raises(live: LiveStack) -> None:
    live.stack.engine.hold()
    stream = await live.openai().completions.create(**COMPLETION, stream=True)
    await live.stack.engine.submissions(1)
    live.stack.engine.die()
    with pytest.raises(openai.APIError, match="the engine stopped"):
        async for _ in stream:
            pass


async def test_the_request_id_of_a_client_comes_back(live: LiveStack) -> None:
    told = await live.openai().completions.with_raw_response.create(
        **COMPLETION, extra_headers={"X-Request-Id": "mine"}
    )
    assert told.headers["X-Request-Id"] == "mine"

"""What is written down of a request: what it asked for, and what that turned out to be."""

import pytest

from perseid_server.frontend.adaptation_options import AutoOptions, BlendOf, Named
from perseid_server.frontend.records import begin_record
from perseid_server.frontend.requests import ChatInput, GenerationRequest, SamplingOptions, TextInput, TokenInput
from perseid_server.observe.line import MOST_TEXT
from perseid_server.observe.record import CallRecord
from tests.server.stack import Stack


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (None, "tiny"), (Named("one"), "one"), (BlendOf((("one", 0.5), ("two", 1.0))), "0.5 one + 1 two"),
        (AutoOptions(), "auto"), (AutoOptions("gates"), "auto:gates"),
    ],
)  # fmt: skip
def test_what_is_asked_for(options, told: str) -> None:
    call = CallRecord()
    record = begin_record(GenerationRequest("r", TextInput("say"), options, call=call), "tiny")
    assert (record.model, call.generations) == (told, [record])


@pytest.mark.parametrize(
    ("source", "operation", "prompt"),
    [
        (TextInput("say"), "text_completion", "say"),
        (TokenInput((1, 2)), "text_completion", "[1, 2]"),
        (ChatInput(({"role": "user", "content": "say"},)), "chat", "[{'role': 'user', 'content': 'say'}]"),
    ],
)
def test_prompts_are_kept_only_where_they_are_wanted(source, operation: str, prompt: str) -> None:
    for keeps_text in (False, True):
        record = begin_record(GenerationRequest("r", source, call=CallRecord(keeps_text=keeps_text)), "tiny")
        assert (record.operation, record.prompt) == (operation, prompt if keeps_text else None)


@pytest.mark.parametrize(
    ("source", "end"),
    [
        (TokenInput((1,) * (4 << 20)), " more"),
        (ChatInput(({"role": "user", "content": "x" * (4 << 20)},)), f"… ({4 << 20} characters)'}}]"),
        (ChatInput(({"role": "user", "content": "x"},) * 100_000), " more"),
    ],
)
def test_of_a_long_prompt_hardly_more_is_kept_than_is_told(source, end: str) -> None:
    record = begin_record(GenerationRequest("r", source, call=CallRecord(keeps_text=True)), "tiny")
    assert record.prompt is not None
    assert MOST_TEXT < len(record.prompt) < 2 * MOST_TEXT
    assert record.prompt.endswith(end)


def test_settings_that_say_nothing_are_left_out() -> None:
    options = SamplingOptions(max_tokens=3, temperature=0.5, n=2)
    record = begin_record(GenerationRequest("r", TextInput("say"), sampling=options), "tiny")
    assert record.settings == {"max_tokens": 3, "temperature": 0.5, "top_p": 1.0, "choice.count": 2}


async def test_what_answers(stack: Stack) -> None:
    one, two = await stack.load("one"), await stack.load("two", seed=1)
    gates = await stack.load_gates("gates", "one", "two")

    async def told(options) -> tuple[str | None, str | None]:
        call = CallRecord()
        asked = GenerationRequest("r", TextInput("say"), options, SamplingOptions(max_tokens=2), call=call)
        async with stack.service.generate(asked) as generation:
            async for _ in generation:
                pass
        return call.generations[0].adapter, call.generations[0].tier

    assert await told(None) == (None, None)
    assert await told(Named("one")) == (f"one@{one[:12]}", None)
    blend = BlendOf((("one", 0.5), ("two", 1.0)))
    assert await told(blend) == (f"0.5 one@{one[:12]} + 1 two@{two[:12]}", None)
    assert await told(AutoOptions("gates")) == (f"auto:gates@{gates[:12]}", "token")

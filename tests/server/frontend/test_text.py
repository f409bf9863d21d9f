"""Prompts and conversations to tokens, and tokens to text and bytes."""

import asyncio
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseid_server.errors import InvalidRequest
from perseid_server.frontend.requests import ChatInput, TextInput, TokenInput
from perseid_server.frontend.text import TextProcessor
from tests.fakes import EOS, VOCAB_SIZE, byte_bundle

CHATML = (
    "{% if messages[0]['role'] != 'system' %}[system You are helpful.]{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "[{{ message['role'] }} {{ message['content'] }}]{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}[assistant {% endif %}"
)


def processor(template: str | None = CHATML) -> TextProcessor:
    return TextProcessor(dataclasses.replace(byte_bundle(), chat_template=template), VOCAB_SIZE)


def chat(*turns: tuple[str, str], **options) -> ChatInput:
    return ChatInput(tuple({"role": role, "content": content} for role, content in turns), **options)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
async def test_text_becomes_tokens_and_back(text: str) -> None:
    text_processor = processor()
    assert text_processor.decode(await text_processor.encode(TextInput(text)), skip_special_tokens=False) == text


async def test_a_long_text_is_tokenized_like_a_short_one() -> None:
    assert await processor().encode(TextInput("ab" * 5000)) == tuple(b"ab" * 5000)


async def test_others_go_on_while_a_long_text_is_tokenized() -> None:
    """A thread alone is not enough: the tokenizer must let go of the interpreter lock."""
    tokenizing = asyncio.create_task(processor().encode(TextInput("ab" * 500_000)))
    turns = 0
    while not tokenizing.done():
        await asyncio.sleep(0.0001)
        turns += 1
    assert len(tokenizing.result()) == 1_000_000
    assert turns > 20


async def test_tokens_are_taken_as_they_are() -> None:
    assert await processor().encode(TokenInput((1, EOS))) == (1, EOS)


@pytest.mark.parametrize("source", [TextInput("ab"), TokenInput((97, 98)), chat(("user", "ab"))])
async def test_tokens_the_base_does_not_have_are_refused(source: TextInput | TokenInput | ChatInput) -> None:
    """A tokenizer may know more than the base: tokens somebody added without training the base on them."""
    smaller = TextProcessor(dataclasses.replace(byte_bundle(), chat_template=CHATML), vocab_size=98)
    with pytest.raises(InvalidRequest, match=r"prompt: token \d+ is not in 0 … 97"):
        await smaller.encode(source)


@pytest.mark.parametrize("length", [1, 5000])
async def test_lone_surrogates_are_refused(length: int) -> None:
    with pytest.raises(InvalidRequest, match="prompt: the text is not valid Unicode"):
        await processor().encode(TextInput("a" * length + "\ud800"))


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE, 1 << 40])
async def test_tokens_outside_the_vocabulary_are_refused(token: int) -> None:
    with pytest.raises(InvalidRequest, match=f"prompt: token {token} is not in 0 … 257"):
        await processor().encode(TokenInput((1, token)))


@pytest.mark.parametrize(
    ("conversation", "text"),
    [
        (chat(("user", "hi")), "[system You are helpful.][user hi][assistant "),
        (chat(("system", "Be brief."), ("user", "hi")), "[system Be brief.][user hi][assistant "),
        (
            chat(("user", "1"), ("assistant", "2"), ("user", "3")),
            "[system You are helpful.][user 1][assistant 2][user 3][assistant ",
        ),
        (chat(("user", "hi"), add_generation_prompt=False), "[system You are helpful.][user hi]"),
        (
            chat(("system", "s"), ("assistant", "So far "), continue_final_message=True),
            "[system s][assistant So far",
        ),
        (
            chat(("system", "é {{ 1 }} {% x %}"), template_arguments={"tools": [{"name": "ü<>"}]}),
            '[system é {{ 1 }} {% x %}][{"name": "ü<>"}][assistant ',
        ),
    ],
    ids=["system default", "own system", "several turns", "no generation prompt", "continued", "template arguments"],
)
def test_conversations_are_rendered_as_the_template_says(conversation: ChatInput, text: str) -> None:
    assert processor().render(conversation) == text


IDS = ["empty", "no template", "unknown role", "type error", "division", "undefined", "mutation", "sandbox"]
IDS += ["special token", "no text"]


@pytest.mark.parametrize(
    ("template", "conversation", "message"),
    [
        (CHATML, chat(), "expected at least one message"),
        (None, chat(("user", "hi")), "this base has no chat template; use prompt"),
        (CHATML, chat(("judge", "hi")), "the chat template refuses them: unknown role judge"),
        ("{{ messages[0].content + 1 }}", chat(("user", "hi")), "the chat template cannot render them"),
        ("{{ 1 / 0 }}", chat(("user", "hi")), "the chat template cannot render them"),
        ("{{ messages[9].content.x }}", chat(("user", "hi")), "the chat template refuses them"),
        ("{{ messages.append(1) }}", chat(("user", "hi")), "the chat template"),
        ("{{ ''.__class__.__mro__ }}", chat(("user", "hi")), "the chat template refuses them"),
        ("{{ x }}", chat(("user", "hi"), template_arguments={"eos_token": "x"}), "the chat template cannot render"),
        (CHATML, chat(("user", ""), continue_final_message=True), "the last message has no text to continue"),
    ],
    ids=IDS,
)
def test_what_a_template_cannot_render_is_refused(template: str | None, conversation: ChatInput, message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        processor(template).render(conversation)
    assert message in refused.value.message
    assert refused.value.field == "messages"


def test_a_template_that_cannot_be_compiled_is_an_error_at_start() -> None:
    with pytest.raises(InvalidRequest, match="chat template cannot be compiled"):
        processor("{% for %}")


async def test_special_tokens_in_a_rendered_conversation_are_single_tokens() -> None:
    text_processor = TextProcessor(byte_bundle(), VOCAB_SIZE)
    assert (await text_processor.encode(chat(("user", "a"))))[0] == text_processor.tokenizer.token_to_id("<turn>")


def test_token_text_and_bytes() -> None:
    text_processor = processor()
    assert (text_processor.token_text(ord("a")), text_processor.token_bytes(ord("a"))) == ("a", b"a")
    assert (text_processor.token_text(0xC3), text_processor.token_bytes(0xC3)) == ("\ufffd", b"\xc3")
    assert (text_processor.token_text(EOS), text_processor.token_bytes(EOS)) == ("<end>", b"<end>")

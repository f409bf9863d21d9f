"""Text to tokens: plain prompts, conversations through the base's chat template, and tokens back to text."""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from perseid_server.access.caller import Caller, current_caller
from perseid_server.errors import InvalidRequest
from perseid_server.frontend.requests import ChatInput, Input, TextInput, TokenInput, check_token_ids
from perseid_server.frontend.tokenizing import Tokenizing
from perseid_server.model.tokenizer import TokenizerBundle

# Batches are encoded on one thread: with more, tokenizers complains when a new engine process is started.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_LONG_TEXT = 2000  # characters; shorter ones are tokenized at once, longer ones in a thread

_LONGEST_COMPLAINT = 500  # characters


class TextProcessor:
    """The tokenizer and chat template of one base."""

    def __init__(self, bundle: TokenizerBundle, vocab_size: int) -> None:
        self.tokenizer = bundle.tokenizer
        self.vocab_size = vocab_size
        self.stop_token_ids = bundle.stop_token_ids
        self.tokenizing = Tokenizing()
        self._special_tokens = bundle.special_tokens
        self._template = _compile(bundle.chat_template) if bundle.chat_template else None
        self._byte_of = _byte_alphabet()

    async def encode(self, source: Input, caller: Caller | None = None) -> tuple[int, ...]:
        """Tokens of an input. InvalidRequest names the field; QueueFull when too many long texts wait already.

        `caller`: whose share of what waits it takes; None: whoever makes the current call.
        """
        caller = current_caller() if caller is None else caller
        match source:
            case TokenInput(ids):
                check_token_ids("prompt", ids, self.vocab_size)
                return ids
            case TextInput(text, add_special_tokens):
                return await self._tokenize(text, caller, add_special_tokens=add_special_tokens)
            case ChatInput():
                return await self._tokenize(self.render(source), caller, add_special_tokens=False)

    async def _tokenize(self, text: str, caller: Caller, *, add_special_tokens: bool) -> tuple[int, ...]:
        try:
            if len(text) < _LONG_TEXT:
                encoding = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
            else:  # as a batch of one: only batches let go of the interpreter lock while they are encoded
                encode = functools.partial(self.tokenizer.encode_batch, add_special_tokens=add_special_tokens)
                [encoding] = await self.tokenizing.run(caller, len(text), lambda: encode([text]))
        except (TypeError, UnicodeEncodeError) as error:  # lone surrogates
            raise InvalidRequest("prompt: the text is not valid Unicode", field="prompt") from error
        ids = tuple(encoding.ids)
        check_token_ids("prompt", ids, self.vocab_size)  # some tokenizers know more tokens than the base has rows
        return ids

    def render(self, chat: ChatInput) -> str:
        """The conversation as the template writes it."""
        if self._template is None:
            raise InvalidRequest("messages: this base has no chat template; use prompt", field="messages")
        if not chat.messages:
            raise InvalidRequest("messages: expected at least one message", field="messages")
        try:
            text = self._template.render(
                messages=list(chat.messages),
                add_generation_prompt=chat.add_generation_prompt and not chat.continue_final_message,
                **self._special_tokens,
                **chat.template_arguments,
            )
        except jinja2.TemplateError as error:
            raise InvalidRequest(
                f"messages: the chat template refuses them: {_told(error)}", field="messages"
            ) from error
        except Exception as error:  # a template is a program: on messages it was not written for, it fails anyhow
            raise InvalidRequest(
                f"messages: the chat template cannot render them: {_told(error)}", field="messages"
            ) from error
        return _cut_after_final_message(text, chat) if chat.continue_final_message else text

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_text(self, token_id: int) -> str:
        """Text of one token, special tokens included; half characters as U+FFFD."""
        return str(self.tokenizer.decode([token_id], skip_special_tokens=False))

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token: byte-level vocabularies tell them even for half characters."""
        token = self.tokenizer.id_to_token(token_id)
        if token is not None and token not in self._added_tokens and all(char in self._byte_of for char in token):
            return bytes(self._byte_of[char] for char in token)
        return self.token_text(token_id).encode()

    def num_characters(self, token_id: int, *, skip_special_tokens: bool = True) -> int:
        """Characters that begin in a token: over an answer's tokens they add up to the length of its text."""
        if skip_special_tokens and token_id in self._special_ids:
            return 0
        return sum(byte & 0xC0 != 0x80 for byte in self.token_bytes(token_id))  # the others go on with one

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self.tokenizer.get_added_tokens_decoder().items()
        return frozenset(token_id for token_id, token in added if token.special)

    @functools.cached_property
    def _added_tokens(self) -> frozenset[str]:
        return frozenset(token.content for token in self.tokenizer.get_added_tokens_decoder().values())


def _byte_alphabet() -> Mapping[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others are moved behind U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _compile(source: str) -> jinja2.Template:
    """The template in a sandbox, with what Hugging Face's templates expect to find."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise InvalidRequest(f"the base's chat template cannot be compiled: {error}") from error


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


def _told(error: Exception) -> str:
    """What a template says; it may repeat what it was given."""
    return str(error)[:_LONGEST_COMPLAINT]


def _cut_after_final_message(text: str, chat: ChatInput) -> str:
    """End the prompt with the last message's text, so that the model goes on with it."""
    final = str(chat.messages[-1].get("content", "")).rstrip()
    place = text.rfind(final)
    if not final or place < 0:
        raise InvalidRequest("continue_final_message: the last message has no text to continue", field="messages")
    return text[: place + len(final)]

"""What requests ask: random tokens that no prefix cache has seen, or the prompts of a file."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from perseid_loadtest.traffic.lengths import Lengths, option, parse_lengths, read_lines
from perseid_loadtest.workload import TOKEN_RANGE
from perseid_server.errors import InvalidRequest

FIELD = "prompt_tokens"
Prompt = str | tuple[int, ...]

WORDS = (
    "time people way water day part place work year number house world city light river mountain garden window "
    "paper music letter story question answer morning evening winter summer bread stone horse bird fish tree road "
    "bridge market school doctor farmer sailor teacher small large quick slow bright dark early late warm cold open "
    "closed red green blue yellow seven twelve thirty hundred walk run read write carry build find lose begin end "
    "north south east west inside outside above below between behind never always often seldom perhaps because"
)
"""A server's own tokens of these make prompts where it tells them."""


class Prompts(Protocol):
    """A prompt for each request."""

    def prompt(self, number: int, draw: random.Random, tokens: int | None = None) -> Prompt: ...


@dataclass(frozen=True, slots=True)
class RandomPrompts:
    """Random tokens: with n known tokens two prompts share their first k with probability n^−k, so that no prefix
    cache helps, but for the first `shared` tokens, which are the same in all prompts of a seed."""

    lengths: Lengths
    vocabulary: Sequence[int]
    shared: tuple[int, ...] = ()

    def prompt(self, number: int, draw: random.Random, tokens: int | None = None) -> Prompt:
        """`tokens` long where it is stated."""
        length = self.lengths.pick(number, draw) if tokens is None else tokens
        own = draw.choices(self.vocabulary, k=max(length - len(self.shared), 0))
        return (*self.shared[:length], *own)


@dataclass(frozen=True, slots=True)
class FilePrompts:
    """The prompts of a file, one after the other, then from the beginning again; a prefix cache may know them."""

    prompts: tuple[Prompt, ...]

    def prompt(self, number: int, draw: random.Random, tokens: int | None = None) -> Prompt:  # noqa: ARG002
        """The prompt whose turn it is."""
        return self.prompts[number % len(self.prompts)]


def parse_prompts(text: str, vocabulary: Sequence[int] | None, shared_tokens: int, seed: int) -> Prompts:
    """Prompts from `--prompt-tokens`: N, LO..HI, or a file whose lines are lengths or {"prompt": text or tokens}.

    `vocabulary` None: tokens of a range that ordinary vocabularies have.
    """
    if Path(text).is_file() and _has_prompts(lines := read_lines(FIELD, text)):
        return FilePrompts(tuple(_prompt(text, number, value) for number, value in lines))
    known = vocabulary or range(*TOKEN_RANGE)
    shared = random.Random(f"{seed} shared").choices(known, k=shared_tokens)  # noqa: S311
    return RandomPrompts(parse_lengths(FIELD, text), known, tuple(shared))


def _has_prompts(lines: Sequence[tuple[int, Any]]) -> bool:
    first = lines[0][1]
    return isinstance(first, Mapping) and "prompt" in first


def _prompt(text: str, number: int, value: Any) -> Prompt:
    told = value.get("prompt") if isinstance(value, Mapping) else None
    if isinstance(told, str) and told:
        return told
    if isinstance(told, list) and told and all(type(token) is int and 0 <= token < 1 << 32 for token in told):
        return tuple(told)
    wanted = 'expected {"prompt": "text"} or {"prompt": [token, …]}'
    raise InvalidRequest(f"{option(FIELD)} {text}, line {number}: {wanted}", field=FIELD)

"""How long prompts and answers are, in tokens."""

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from perseid_server.errors import InvalidRequest

MOST = 10_000_000
"""More than any model's context; a larger number is a slip of the hand."""


class Lengths(Protocol):
    """A number of tokens for each request."""

    def pick(self, number: int, draw: random.Random) -> int: ...


@dataclass(frozen=True, slots=True)
class Between:
    """Uniform from `least` to `most`, both included. Equal: always that."""

    least: int
    most: int

    def pick(self, number: int, draw: random.Random) -> int:  # noqa: ARG002  each is drawn alike
        """A length."""
        return draw.randint(self.least, self.most)


@dataclass(frozen=True, slots=True)
class InTurn:
    """Lengths of a file, one after the other, then from the beginning again."""

    lengths: tuple[int, ...]

    def pick(self, number: int, draw: random.Random) -> int:  # noqa: ARG002  nothing is drawn
        """The length whose turn it is."""
        return self.lengths[number % len(self.lengths)]


def parse_lengths(field: str, text: str) -> Lengths:
    """Lengths from N, LO..HI or a file. InvalidRequest names the field, what was expected and, in a file, the line."""
    if re.fullmatch(r"\d{1,12}", text):
        return _between(field, text, int(text), int(text))
    if match := re.fullmatch(r"(\d{1,12})\.\.(\d{1,12})", text):
        return _between(field, text, int(match[1]), int(match[2]))
    lines = read_lines(field, text)
    return InTurn(tuple(_length(field, text, number, line) for number, line in lines))


def _between(field: str, text: str, least: int, most: int) -> Between:
    if not 1 <= least <= most <= MOST:
        raise InvalidRequest(
            f"{option(field)} {text}: expected N or LO..HI with 1 ≤ LO ≤ HI ≤ {MOST:,} tokens", field=field
        )
    return Between(least, most)


def read_lines(field: str, text: str) -> Sequence[tuple[int, Any]]:
    """JSON values of a file's lines with their numbers, empty lines left out. InvalidRequest when there are none."""
    path = Path(text)
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        wanted = "expected a number of tokens, LO..HI such as 32..128, or a file"
        raise InvalidRequest(f"{option(field)} {text!r}: {wanted} ({reason})", field=field) from error
    values = [(number, _json(field, text, number, line)) for number, line in enumerate(lines, 1) if line.strip()]
    if not values:
        raise InvalidRequest(f"{option(field)} {text}: the file has no line", field=field)
    return values


def option(field: str) -> str:
    """The field as it stands on the command line."""
    return f"--{field.replace('_', '-')}"


def _json(field: str, text: str, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{option(field)} {text}, line {number}: not a JSON value", field=field) from error


def _length(field: str, text: str, number: int, value: Any) -> int:
    told = value.get(field) if isinstance(value, Mapping) else value
    if isinstance(told, bool) or not isinstance(told, int) or not 1 <= told <= MOST:
        wanted = f'expected a number of tokens, or an object with "{field}"'
        raise InvalidRequest(f"{option(field)} {text}, line {number}: {wanted}", field=field)
    return told

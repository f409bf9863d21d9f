r"""Module patterns, with PEFT's meaning (`peft.utils.other.get_pattern_key`), matched in bounded time.

    a key matches a module  ⇔  re.match(rf"(.*\.)?({key})$", module)

The keys come from a stranger's file, and a short expression can keep Python's `re` busy for years while it holds the
interpreter. So an expression is read into steps that map a set of positions in the text to the set of positions they
can lead to. Nothing is tried twice; a set is an int with one bit for each position.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce

MAX_LENGTH = 256
MAX_DEPTH = 8

_NAME = re.compile(r"(?P<whole>\^?)(?P<name>[\w.]+)")
_REPETITION = re.compile(
    r"(?:(?P<sign>[*+?])|\{(?:(?P<exactly>\d{1,3})|(?P<least>\d{0,3}),(?P<most>\d{0,3}))\})(?P<more>[?+]?)"
)
_CLASS = re.compile(r"\[\^?\]?(?:[^\]\\]|\\.)*\]")
_GROUP = re.compile(r"\((?:\?:|\?P<[A-Za-z_]\w*>|(?!\?))")
_BOUNDS = {"*": (0, None), "+": (1, None), "?": (0, 1)}


@dataclass(frozen=True, slots=True)
class ModulePattern:
    """One key of `rank_pattern` or `alpha_pattern`."""

    key: str
    matches: Callable[[str], bool]

    @staticmethod
    def parse(key: str) -> "ModulePattern":
        """ValueError when the key is not an expression, or uses what is not supported (lookaround, references)."""
        if named := _NAME.fullmatch(key):
            name, whole = named["name"], bool(named["whole"])
            return ModulePattern(key, lambda module: _ends_with(module, name, whole=whole))
        if len(key) > MAX_LENGTH:
            raise ValueError(f"it has {len(key)} characters; an expression may have {MAX_LENGTH}")
        step = _Parser(key).parse()
        return ModulePattern(key, lambda module: _leads_to_end(step, _Text(module)))

    @property
    def is_name(self) -> bool:
        """Whether it is a plain name, which costs next to nothing to match."""
        return _NAME.fullmatch(self.key) is not None


def _ends_with(module: str, name: str, *, whole: bool) -> bool:
    """The quick way for plain names. As in any expression, a dot in the name stands for any character."""
    start = len(module) - len(name)
    if start < 0 or (start > 0 and (whole or module[start - 1] != ".")):
        return False
    return all(wanted in (".", found) for wanted, found in zip(name, module[start:], strict=True))


@dataclass(slots=True)
class _Text:
    """A module's name and, for each one-character expression, the positions where it matches."""

    chars: str
    masks: dict[str, int] = field(default_factory=dict)

    def where(self, one: "re.Pattern[str]") -> int:
        mask = self.masks.get(one.pattern)
        if mask is None:
            mask = sum(1 << at for at, char in enumerate(self.chars) if one.fullmatch(char))
            self.masks[one.pattern] = mask
        return mask


_Step = Callable[[_Text, int], int]  # (text, positions) → positions reached


def _leads_to_end(step: _Step, text: _Text) -> bool:
    starts = 1 | sum(1 << at + 1 for at, char in enumerate(text.chars) if char == ".")
    return bool(step(text, starts) >> len(text.chars))


def _char(expression: str) -> _Step:
    one = re.compile(expression)
    return lambda text, at: (at & text.where(one)) << 1


def _sequence(steps: Sequence[_Step]) -> _Step:
    return lambda text, at: reduce(lambda reached, step: reached and step(text, reached), steps, at)


def _either(branches: Sequence[_Step]) -> _Step:
    return lambda text, at: reduce(lambda reached, branch: reached | branch(text, at), branches, 0)


def _begin(_text: _Text, at: int) -> int:
    return at & 1


def _end(text: _Text, at: int) -> int:
    return at & 1 << len(text.chars)


def _repeated(step: _Step, least: int, most: int | None) -> _Step:
    def run(text: _Text, at: int) -> int:
        for _ in range(least):
            at, before = step(text, at), at
            if at == before:
                break
        reached = new = at
        count = least
        while new and (most is None or count < most):
            new = step(text, new) & ~reached
            reached |= new
            count += 1
        return reached

    return run


class _Parser:
    """Recursive descent over the part of Python's syntax that says something about names."""

    def __init__(self, expression: str) -> None:
        self._expression = expression
        self._at = 0
        self._depth = 0

    def parse(self) -> _Step:
        step = self._alternatives()
        if self._rest:
            raise ValueError("unbalanced parenthesis")
        return step

    @property
    def _rest(self) -> str:
        return self._expression[self._at :]

    def _take(self, pattern: "re.Pattern[str]") -> "re.Match[str] | None":
        match = pattern.match(self._expression, self._at)
        if match:
            self._at = match.end()
        return match

    def _alternatives(self) -> _Step:
        branches = [self._branch()]
        while self._rest.startswith("|"):
            self._at += 1
            branches.append(self._branch())
        return _either(branches)

    def _branch(self) -> _Step:
        steps: list[_Step] = []
        while self._rest and self._rest[0] not in "|)":
            steps.append(self._piece())
        return _sequence(steps)

    def _piece(self) -> _Step:
        step = self._atom()
        repetition = self._take(_REPETITION)
        if repetition is None:
            return step
        if step in (_begin, _end):
            raise ValueError("nothing to repeat")
        if repetition["more"] == "+":
            raise ValueError("possessive repetitions are not supported")
        return _repeated(step, *_bounds(repetition))

    def _atom(self) -> _Step:
        char = self._rest[0]
        if char == "(":
            return self._group()
        if char == "[":
            return self._class()
        if char == "\\":
            return self._escape()
        if char in "*+?{":
            raise ValueError("nothing to repeat, or a repetition of a repetition")
        self._at += 1
        if char in "^$":
            return _begin if char == "^" else _end
        return _char("." if char == "." else re.escape(char))

    def _group(self) -> _Step:
        if self._take(_GROUP) is None:
            raise ValueError("groups that begin with (? are supported as (?:…) and (?P<name>…) only")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ValueError(f"groups are nested more than {MAX_DEPTH} deep")
        step = self._alternatives()
        if not self._rest.startswith(")"):
            raise ValueError("missing ), unterminated group")
        self._at += 1
        self._depth -= 1
        return step

    def _class(self) -> _Step:
        found = self._take(_CLASS)
        if found is None:
            raise ValueError("unterminated character set")
        try:
            return _char(found[0])
        except re.error as error:
            raise ValueError(str(error)) from error

    def _escape(self) -> _Step:
        escaped = self._rest[1:2]
        self._at += 2
        if escaped in ("A", "Z"):
            return _begin if escaped == "A" else _end
        if escaped and (escaped in "dDsSwW" or not escaped.isalnum()):
            return _char(f"\\{escaped}")
        raise ValueError(f"the escape \\{escaped} is not supported")


def _bounds(repetition: "re.Match[str]") -> tuple[int, int | None]:
    if repetition["sign"]:
        return _BOUNDS[repetition["sign"]]
    if repetition["exactly"]:
        return int(repetition["exactly"]), int(repetition["exactly"])
    least = int(repetition["least"] or 0)
    most = int(repetition["most"]) if repetition["most"] else None
    if most is not None and most < least:
        raise ValueError("min repeat greater than max repeat")
    return least, most

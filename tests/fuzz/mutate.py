"""Good input made bad: bytes, JSON and values."""

import json
import re
from random import Random
from typing import Any

NUMBERS = (
    0, 1, -1, 2, 7, 127, 128, 255, 256, 65535, 2**31 - 1, 2**31, -(2**31), 2**32 - 1, 2**32, 2**48, 2**53 + 1,
    2**63 - 1, 2**63, -(2**63), 2**64 - 1, 2**64, 10**30, 10**400, -0.0, 0.5, -1.5, 1e-320, 1e308, -1e308, float("nan"),
    float("inf"), float("-inf"),
)  # fmt: skip
TEXTS = (
    "", " ", "a", "A" * 300, "x" * 70_000, "\0", "a\0b", "\n", "\ud800", "語" * 50, "🦙", "../../etc/passwd",
    "/dev/zero", "{{ 7 * 7 }}", "{% raise %}", "%s%n", "$(id)", "'", '"', "\\", "true", "null", "NaN", "-1", "1e999",
    "__class__", "(a+)+$", "[", "(?:", "\u202e", "\ufeff", "auto", "base",
)  # fmt: skip
U64 = (
    0, 1, 2, 7, 8, 9, 255, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 48, 1 << 62, (1 << 63) - 1, 1 << 63,
    (1 << 64) - 1,
)  # fmt: skip


def value(random: Random, depth: int = 3) -> Any:
    """Any value of JSON, mostly a strange one."""
    kind = random.randrange(10 if depth else 7)
    if kind < 3:
        return random.choice(NUMBERS)
    if kind < 6:
        return random.choice(TEXTS)
    if kind < 7:
        return random.choice((None, True, False, [], {}))
    if kind < 8:
        return [value(random, depth - 1) for _ in range(random.randrange(4))]
    if kind < 9:
        return {random.choice(TEXTS): value(random, depth - 1) for _ in range(random.randrange(4))}
    return f"deep{random.choice((20, 200, 900, 2000, 100_000))}"


def mutate(random: Random, good: Any) -> Any:
    """A copy with one to three places changed. What has a place inside is dict and list; the rest is replaced."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        good = _change(random, good)
    return good


def _change(random: Random, good: Any) -> Any:
    if isinstance(good, dict) and good and random.random() < 0.85:
        return _change_object(random, good)
    if isinstance(good, list) and good and random.random() < 0.85:
        place = random.randrange(len(good))
        match random.randrange(5):
            case 0:
                return good[:place] + good[place + 1 :]
            case 1:
                return [*good, good[place]]
            case 2:
                return good * random.choice((2, 50))
            case _:
                return [*good[:place], _change(random, good[place]), *good[place + 1 :]]
    return _scalar(random, good)


def _change_object(random: Random, good: dict[str, Any]) -> dict[str, Any]:
    name = random.choice(list(good))
    match random.randrange(6):
        case 0:
            return {other: item for other, item in good.items() if other != name}
        case 1:
            return good | {random.choice((*TEXTS, name.upper(), name + "x")): value(random)}
        case 2:
            return {(random.choice(TEXTS) if other == name else other): item for other, item in good.items()}
        case _:
            return good | {name: _change(random, good[name])}


def _scalar(random: Random, good: Any) -> Any:
    if type(good) in {int, float} and random.random() < 0.4:
        return good + random.choice((-1, 1, 2, -good, 2**32))
    if isinstance(good, str) and good and random.random() < 0.4:
        place = random.randrange(len(good))
        return random.choice((good[:place], good[place:], good * 2, good[:place] + random.choice(TEXTS) + good[place:]))
    return value(random)


def json_text(content: Any, *, ascii_only: bool = True) -> str:
    """JSON, deeper than Python itself could write it where `value` asked for that."""
    text = json.dumps(content, ensure_ascii=ascii_only)
    return re.sub(r'"deep(\d{2,6})"', lambda found: "[" * int(found[1]) + "]" * int(found[1]), text)


def json_bytes(random: Random, content: Any) -> bytes:
    """As JSON, now and then not quite: twice the same key, a literal that is none, a byte too few."""
    text = json_text(content, ascii_only=random.random() < 0.8)
    if isinstance(content, dict) and content and random.random() < 0.1:
        again = json_text({random.choice(list(content)): value(random)})
        text = again[:-1] + ", " + text[1:]
    raw = text.encode("utf-8", "surrogatepass")
    return corrupt(random, raw) if random.random() < 0.1 else raw


def corrupt(random: Random, raw: bytes, until: int | None = None) -> bytes:
    """The bytes with one to four places changed, within the first `until` where that is told."""
    for _ in range(random.randint(1, 4)):
        raw = random.choice(tuple(_WAYS))(random, raw, min(len(raw), until or len(raw)))
    return raw


def _place(random: Random, end: int) -> int:
    return random.randrange(end) if end else 0


def _flip(random: Random, raw: bytes, end: int) -> bytes:
    place = _place(random, end)
    return raw[:place] + bytes(byte ^ 1 << random.randrange(8) for byte in raw[place : place + 1]) + raw[place + 1 :]


def _byte(random: Random, raw: bytes, end: int) -> bytes:
    place = _place(random, end)
    return raw[:place] + bytes((random.choice((0, 1, 0x7F, 0x80, 0xC0, 0xFF, 34, 92, 91, 123)),)) + raw[place + 1 :]


def _cut(random: Random, raw: bytes, end: int) -> bytes:
    return raw[: _place(random, end)]


def _drop(random: Random, raw: bytes, end: int) -> bytes:
    place = _place(random, end)
    return raw[:place] + raw[place + random.choice((1, 2, 8, 64)) :]


def _repeat(random: Random, raw: bytes, end: int) -> bytes:
    place, length = _place(random, end), random.choice((1, 8, 64))
    return raw[:place] + raw[place : place + length] * random.choice((2, 3, 100)) + raw[place + length :]


def _insert(random: Random, raw: bytes, end: int) -> bytes:
    place = _place(random, end)
    return raw[:place] + random.randbytes(random.choice((1, 4, 16))) + raw[place:]


def _number(random: Random, raw: bytes, end: int) -> bytes:
    place, size = _place(random, end), random.choice((4, 8))
    told = random.choice(U64) & ((1 << 8 * size) - 1)
    return raw[:place] + told.to_bytes(size, random.choice(("little", "big"))) + raw[place + size :]


_WAYS = (_flip, _byte, _cut, _drop, _repeat, _insert, _number)

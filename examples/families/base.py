"""What a prompt family is: a task made of phrasings, and of subjects with answers that a program knows."""

import random
import zlib
from collections.abc import Callable

from tasks.base import DEV_ITEMS, HELD_OUT_ITEMS, Item, Splits, Task

TRAIN_ITEMS = 200
_MOST_DRAWS = 20_000

Draw = Callable[[random.Random], tuple[str, str]]
"""Draws what is asked about, and the answer."""


def family(name: str, description: str, phrasings: tuple[str, ...], draw: Draw, truth: str = "Python") -> Task:
    """A task whose splits share no subject.

    `{}` in a phrasing stands for the subject. The last phrasing appears in held-out items only, where every other item
    uses it; the others take turns everywhere.
    """
    seed = zlib.crc32(name.encode())
    return Task(name, description, truth, lambda: _splits(name, phrasings, draw, random.Random(seed)))


def _splits(name: str, phrasings: tuple[str, ...], draw: Draw, rng: random.Random) -> Splits:
    known, unseen = phrasings[:-1], phrasings[-1]
    subjects = _distinct(name, draw, rng)
    taking_turns = [Item(known[i % len(known)].format(x), answer) for i, (x, answer) in enumerate(subjects)]
    held_out_end = HELD_OUT_ITEMS + DEV_ITEMS
    held_out = [
        Item(unseen.format(x), answer) if i % 2 else taking_turns[i]
        for i, (x, answer) in enumerate(subjects[:HELD_OUT_ITEMS])
    ]
    return Splits(
        train=tuple(taking_turns[held_out_end:]),
        dev=tuple(taking_turns[HELD_OUT_ITEMS:held_out_end]),
        held_out=tuple(held_out),
    )


def _distinct(name: str, draw: Draw, rng: random.Random) -> list[tuple[str, str]]:
    """As many different subjects as all splits need."""
    wanted = HELD_OUT_ITEMS + DEV_ITEMS + TRAIN_ITEMS
    found: dict[str, str] = {}
    for _ in range(_MOST_DRAWS):
        subject, answer = draw(rng)
        found.setdefault(subject, answer)
        if len(found) == wanted:
            return list(found.items())
    raise ValueError(f"{name}: {len(found)} different subjects, not {wanted}")

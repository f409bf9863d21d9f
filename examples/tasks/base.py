"""What a task is: questions with known answers, split once and for all, and a checker."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

DEV_ITEMS = 48
HELD_OUT_ITEMS = 100


@dataclass(frozen=True)
class Item:
    """One question, as a client would send it, and the answer that counts as the truth."""

    question: str
    answer: str


@dataclass(frozen=True)
class Splits:
    """A task's items. No question of one part appears in another."""

    train: tuple[Item, ...]
    dev: tuple[Item, ...]
    held_out: tuple[Item, ...]

    def __post_init__(self) -> None:
        parts = [{item.question for item in part} for part in (self.train, self.dev, self.held_out)]
        if any(parts[i] & parts[j] for i, j in ((0, 1), (0, 2), (1, 2))):
            raise ValueError("the same question is in two splits")
        if len(parts[2]) != HELD_OUT_ITEMS:
            raise ValueError(f"{len(parts[2])} held-out questions, not {HELD_OUT_ITEMS}")


def same_text(answer_text: str, item: Item) -> bool:
    """The exact answer, but for white space at both ends."""
    return answer_text.strip() == item.answer


@dataclass(frozen=True)
class Task:
    """A task whose answers a program can check.

    Attributes:
        name: the adapter's name as well, in lower case with hyphens.
        description: one line for the tables and the model cards.
        truth: the library that gives the right answers.
        build: makes the splits; calling it twice gives equal splits.
        check: whether a model's whole answer is right.
        max_new_tokens: generous room for the longest answer.
    """

    name: str
    description: str
    truth: str
    build: Callable[[], Splits]
    check: Callable[[str, Item], bool] = same_text
    max_new_tokens: int = 32

    @cached_property
    def splits(self) -> Splits:
        """The task's items, built on first use."""
        return self.build()


def split(items: Sequence[Item], seed: int, train_items: int) -> Splits:
    """Shuffle the items, drop repeated questions and deal them out: held-out first, then dev, then train."""
    unique = list({item.question: item for item in items}.values())
    random.Random(seed).shuffle(unique)
    dev_end = HELD_OUT_ITEMS + DEV_ITEMS
    return Splits(
        train=tuple(unique[dev_end : dev_end + train_items]),
        dev=tuple(unique[HELD_OUT_ITEMS:dev_end]),
        held_out=tuple(unique[:HELD_OUT_ITEMS]),
    )

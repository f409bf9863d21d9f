"""Sixty-four prompt families with answers a program checks: the example tasks, then others that are cheap to make.

They are what gates are tried on as the number of adapters grows. Splits share no subject, and half of the held-out
items of a new family are asked in words that never appear in training.
"""

from tasks import TASKS
from tasks.base import Task

from families.numbers import NUMBER_FAMILIES
from families.phrases import PHRASE_FAMILIES
from families.times import TIME_FAMILIES
from families.units import UNIT_FAMILIES
from families.words import WORD_FAMILIES

__all__ = ["FAMILIES"]


def _in_turn(*kinds: tuple[Task, ...]) -> list[Task]:
    """One of each kind, then the next of each: the first of them are mixed already."""
    longest = max(len(kind) for kind in kinds)
    return [kind[i] for i in range(longest) for kind in kinds if i < len(kind)]


FAMILIES: dict[str, Task] = {
    **TASKS,
    **{
        task.name: task
        for task in _in_turn(WORD_FAMILIES, PHRASE_FAMILIES, NUMBER_FAMILIES, UNIT_FAMILIES, TIME_FAMILIES)
    },
}

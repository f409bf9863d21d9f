"""Rounds in which every engine is asked the same, one right after the other, and what comes out of them."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from perseid_loadtest.engines import Engine
from perseid_loadtest.workload import Case

T = TypeVar("T")

Rates = Mapping[tuple[str, Case], Sequence[float]]
"""Tokens a second of an engine in a case, one for each round."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Several rounds of one figure."""

    median: float
    spread: float  # (largest − smallest) / median

    @staticmethod
    def of(values: Sequence[float]) -> "Summary":
        """Median and spread."""
        median = statistics.median(values)
        return Summary(median, (max(values) - min(values)) / median)


def measure(engines: Sequence[Engine], cases: Sequence[Case], rounds: int, tell: Callable[[str], None]) -> Rates:
    """Ask every engine for every case it can do, `rounds` times after one that warms caches and adapters.

    Within a case the engines follow each other at once, and another one is first in each round, so that what else
    the machine does falls on all of them.
    """
    rates: dict[tuple[str, Case], list[float]] = {}
    for turn in range(rounds + 1):
        name = f"round {turn} of {rounds}" if turn else "warming up"
        for case in cases:
            tell(f"{name}: {case.kind} {case}")
            for engine in rotated(engines, turn):
                if engine.can(case):
                    rate = engine.rate(case, turn)
                    if turn:
                        rates.setdefault((engine.name, case), []).append(rate)
    return rates


def rotated(competitors: Sequence[T], turn: int) -> list[T]:
    """Another one first in each round."""
    start = turn % len(competitors)
    return [*competitors[start:], *competitors[:start]]


def ratio(rates: Rates, ours: tuple[str, Case], theirs: tuple[str, Case]) -> Summary | None:
    """`ours` ÷ `theirs`, round by round; None where one was not measured."""
    if not rates.get(ours) or not rates.get(theirs):
        return None
    return Summary.of([mine / other for mine, other in zip(rates[ours], rates[theirs], strict=True)])

"""Hostile cases from a seed, counted. A case that fails says how to run it again, alone.

FUZZ_SEED    another seed, other cases (0)
FUZZ_SCALE   so many times the cases (1)
FUZZ_CASE    only the case of that number
"""

import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest

SEED = int(os.environ.get("FUZZ_SEED", "0"))
SCALE = float(os.environ.get("FUZZ_SCALE", "1"))
CASE = os.environ.get("FUZZ_CASE")

SENT: Counter[str] = Counter()
"""Cases by fuzzer, for the summary."""


def fuzzer(short: int, long: int) -> pytest.MarkDecorator:
    """A test that takes a `campaign`, of so many cases in `make test` and so many in `make fuzz`."""
    forms = [pytest.param(short, id="short"), pytest.param(long, id="long", marks=pytest.mark.fuzz)]
    return pytest.mark.parametrize("campaign", forms, indirect=True)


@dataclass(frozen=True)
class Campaign:
    """The cases of one fuzzer."""

    name: str  # of the test, which with its seed and number makes a case
    node: str  # how pytest calls it
    count: int

    def run(self, check: Callable[[random.Random], None]) -> None:
        """Check every case. What one needs to know of chance it takes from the generator that it is given."""
        for number in range(self.count) if CASE is None else [int(CASE)]:
            with self.case(number):
                check(random.Random(f"{SEED} {self.name} {number}"))

    def case(self, number: int) -> "Case":
        """Count a case; what goes wrong within tells how to see it again."""
        SENT[self.name] += 1
        return Case(f"FUZZ_SEED={SEED} FUZZ_CASE={number} python -m pytest -m 'fuzz or not fuzz' '{self.node}'")


@dataclass(frozen=True)
class Case:
    """One case."""

    command: str

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            error.add_note(f"once more: {self.command}")

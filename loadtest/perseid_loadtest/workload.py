"""What is asked of every engine: the same random prompts, the same adapters, the same number of tokens."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

KINDS = ("base", "one", "mixed")
PREFILL_TOKENS = 512
TOKEN_RANGE = (1000, 20000)
"""Prompts are random tokens of this range: ordinary words of the embedded base's vocabulary."""


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure: decoding `batch` requests at once, or the prefill of one long prompt."""

    kind: str  # one of KINDS
    batch: int
    phase: Literal["decode", "prefill"] = "decode"

    def __str__(self) -> str:
        """How tables name it."""
        return f"prefill {PREFILL_TOKENS}" if self.phase == "prefill" else str(self.batch)


@dataclass(frozen=True, slots=True)
class Job:
    """One greedy request for exactly `tokens` tokens. `adapter` "" is the base."""

    prompt: tuple[int, ...]
    adapter: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """The sizes of the requests and the names of the adapters, in the order in which rows take them."""

    prompt: int  # tokens
    tokens: int  # tokens to generate
    adapters: tuple[str, ...] = ()

    def jobs(self, case: Case, turn: int) -> list[Job]:
        """The requests of a case. A round and a case have prompts of their own, so no prefix cache can help, and
        they are the same for every engine."""
        if case.phase == "prefill":
            return [Job(_prompt(case, turn, 0, PREFILL_TOKENS), self.adapter(case.kind, 0), 1)]
        return [
            Job(_prompt(case, turn, row, self.prompt), self.adapter(case.kind, row), self.tokens)
            for row in range(case.batch)
        ]

    def adapter(self, kind: str, row: int) -> str:
        """Which adapter a row of the batch names."""
        if kind == "base" or not self.adapters:
            return ""
        return self.adapters[0] if kind == "one" else self.adapters[row % len(self.adapters)]


def cases(batches: Sequence[int], *, adapters: bool) -> list[Case]:
    """All cases, kind by kind. Without adapters only the base's."""
    kinds = KINDS if adapters else KINDS[:1]
    decode = [Case(kind, batch) for kind in kinds for batch in batches]
    return decode + [Case(kind, 1, "prefill") for kind in kinds if kind != "mixed"]


def _prompt(case: Case, turn: int, row: int, length: int) -> tuple[int, ...]:
    draw = random.Random(f"{turn} {case.phase} {case.kind} {case.batch} {row}")  # noqa: S311
    return tuple(draw.randrange(*TOKEN_RANGE) for _ in range(length))

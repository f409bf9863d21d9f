"""All that is decided before a request is sent. A plan with a seed is the same each time, however fast answers come."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from perseid_loadtest.traffic.arrivals import Arrivals, Due
from perseid_loadtest.traffic.lengths import Lengths
from perseid_loadtest.traffic.popularity import Popularity
from perseid_loadtest.traffic.prompts import Prompt, Prompts

BASE = "base"
"""How options and traces name the base."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is sent: greedy, and for exactly so many tokens where the server can be told to go on after an end token."""

    number: int
    adapter: str  # "" the base
    prompt: Prompt
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Requests by number. Each has a generator of its own, so that number n is the same whatever order they are made
    in and whichever client sends it."""

    seed: int
    popularity: Popularity
    prompts: Prompts
    output: Lengths
    arrivals: Arrivals | None = None  # None in a closed loop

    def request(self, number: int, due: Due | None = None) -> Request:
        """Request `number`. What a trace states of it stands."""
        draw = random.Random(f"{self.seed} {number}")  # noqa: S311
        adapter = self.popularity.pick(number, draw)
        output = self.output.pick(number, draw)
        stated = due or Due(0.0)
        return Request(
            number,
            adapter if stated.adapter is None else name_of(stated.adapter),
            self.prompts.prompt(number, draw, stated.prompt_tokens),
            output if stated.output_tokens is None else stated.output_tokens,
        )

    def due(self) -> Iterator[Due]:
        """When requests are due in an open loop."""
        assert self.arrivals is not None
        return self.arrivals.due(random.Random(f"{self.seed} arrivals"))  # noqa: S311

    def fresh(self, trial: int, arrivals: Arrivals) -> "Plan":
        """The same kind of requests, other ones: for a trial on a server that still has the last one's in its cache."""
        return replace(self, seed=self.seed + trial * 1_000_003, arrivals=arrivals)


def name_of(text: str) -> str:
    """An adapter as a request has it, "" the base."""
    return "" if text == BASE else text

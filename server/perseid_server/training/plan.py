"""Which samples a step takes: a function of the seed and the step's number, so that a resumed run sees the same."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from perseid_server.training.samples import Sample


@dataclass(frozen=True, slots=True)
class Group:
    """Samples of one kind, `per_step` of which are in every step."""

    samples: tuple[Sample, ...]
    per_step: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every sample has been seen."""
        return -(-len(self.samples) // self.per_step)


@dataclass(frozen=True, slots=True)
class Plan:
    """Every group goes round its own samples, in a new order each time."""

    groups: tuple[Group, ...]
    seed: int

    def samples(self, step: int) -> list[Sample]:
        """Those of one step."""
        return [sample for place, group in enumerate(self.groups) for sample in self._of(place, group, step)]

    def _of(self, place: int, group: Group, step: int) -> Sequence[Sample]:
        count = len(group.samples)
        numbers = range(step * group.per_step, (step + 1) * group.per_step)
        orders = {number // count: _order(count, f"{self.seed} {place} {number // count}") for number in numbers}
        return [group.samples[orders[number // count][number % count]] for number in numbers]


def _order(count: int, seed: str) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)  # noqa: S311  not a secret
    return order

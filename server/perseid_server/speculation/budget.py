"""The draft budget: which sequences ask their heads, and how many drafted rows a step has. Standard library only.

A step of B decoding sequences takes c(B). A drafted row that is accepted with probability p saves p · c(B) / B, the
time of a token, and costs what one row more does. So rows are taken in the order of their p, across the whole batch,
up to the number n that makes (B + Σ p) / c'(B + n) largest, c' being the time of steps with trees; and none if that is
not more than B / c(B) by a margin.

Rows of prompts that are read in the same step are left out of both: they have to be read whatever is drafted, and what
an accepted draft saves is a row of a later step, not a share of this one.

Heads cost time whether a row pays or not. They are asked as long as they have saved time lately, for that adapter and
that size of batch. Once they have not, they rest, twice as long each time, and then are tried again.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from perseid_server.speculation.step_clock import StepClock

MARGIN = 1.08
"""Trees have to promise so much more than no trees: the best of many noisy estimates is overrated, and drafting itself
takes time."""

SMOOTH = 0.03
"""Weight of the newest step in what heads have saved lately."""

OPTIMISM = 0.1
"""What the first heads are taken to save, in tokens a step: they are tried for some twenty to forty steps before they
rest, the sooner the more they cost. What comes later begins with what others saved."""

WORST = -1.0
"""A step is not held to have cost more tokens than that: something else ran."""

REST_BELOW, HOPE = 0.02, 0.06
"""Heads that saved less lately rest: a little above zero, as not all that drafting costs is counted. When they are
tried again, they begin above it."""

FIRST_REST, LONGEST_REST = 64, 4096
"""Steps without heads, after they did not pay."""

YOUNG = 32
"""Steps until an adapter's heads are judged by what they save themselves alone: where all others' save nothing, these
are not tried for as long as the first ones were."""

TRIAL = 10
"""Steps with heads after a rest, before it is judged again."""

SELDOM_ABOVE, LULL_AFTER, SELDOM = 0.5, 32, 4
"""Where only drafts above that pay, and none was found so many times in a row, every fourth step looks for some."""


def best_count(clock: StepClock, num_sequences: int, values: Sequence[float], num_rows: int | None = None) -> int:
    """How many of the drafted rows to take: the first n of `values`, which descend. `num_rows`: all rows of the step
    without drafts, where it has others than the decoding sequences'."""
    rows = num_sequences if num_rows is None else num_rows
    decoding, plain = clock.seconds(num_sequences, trees=False), clock.seconds(rows, trees=False)
    best, best_rate = 0, num_sequences / decoding * MARGIN
    expected = float(num_sequences)
    for count, value in enumerate(values, start=1):
        expected += value
        rate = expected / (decoding + max(clock.seconds(rows + count, trees=True) - plain, 0.0))
        if rate > best_rate:
            best, best_rate = count, rate
    return best


def least_worthwhile(clock: StepClock, num_sequences: int, num_rows: int) -> float:
    """The acceptance below which no row pays, however many there are."""
    plain = clock.seconds(num_rows, trees=False)
    cheapest = min((clock.seconds(num_rows + count, trees=True) - plain) / count for count in (1, 2, 4, 8, 16, 32))
    return max(cheapest, 0.0) * num_sequences / clock.seconds(num_sequences, trees=False)


@dataclass(slots=True)
class Lull:
    """Whether drafts are looked for at all, where only nearly certain ones pay: looking takes time as well."""

    _fruitless: int = 0  # times in a row that nothing worthwhile was found
    _skipped: int = 0  # steps since it was last looked for

    def skips(self, least_value: float) -> bool:
        """Whether to look for nothing in this step; counts it."""
        if least_value < SELDOM_ABOVE or self._fruitless < LULL_AFTER:
            return False
        self._skipped = (self._skipped + 1) % SELDOM
        return self._skipped != 0

    def saw(self, *, found: bool) -> None:
        """Drafts were looked for."""
        self._fruitless = 0 if found else self._fruitless + 1


@dataclass(slots=True)
class Habit:
    """Whether the heads of one adapter are asked at one size of batch."""

    saved: float = OPTIMISM  # tokens a step, smoothed
    resting: int = 0  # steps without heads still to come
    rest: int = FIRST_REST
    trial: int = 0  # steps with heads until it is judged
    seen: int = 0  # steps with heads

    def asks(self) -> bool:
        """Whether to ask in this step; counts it."""
        if self.resting:
            self.resting -= 1
            if not self.resting:
                self.trial, self.saved = TRIAL, HOPE
            return False
        return True

    def saw(self, saved: float) -> None:
        """Heads were asked, and it saved so many tokens' time (or cost, below zero)."""
        self.saved += SMOOTH * (max(saved, WORST) - self.saved)
        self.seen += 1
        if self.trial:
            self.trial -= 1
        elif self.saved < REST_BELOW:
            self.resting, self.rest = self.rest, min(2 * self.rest, LONGEST_REST)
        if self.saved > OPTIMISM:
            self.rest = FIRST_REST


@dataclass(slots=True)
class UsualCost:
    """What something usually takes: single measurements that are far above it hardly count."""

    seconds: float | None = None

    def saw(self, seconds: float) -> float:
        """One more measurement; returns the estimate."""
        if self.seconds is None:
            self.seconds = seconds
        weight = 0.3 if seconds < self.seconds else 0.03
        self.seconds += weight * (seconds - self.seconds)
        return self.seconds


def _size(num_sequences: int) -> int:
    """Sizes of batch are taken together up to the next power of two."""
    return (num_sequences - 1).bit_length()


@dataclass(slots=True)
class Habits:
    """Of all adapters and sizes of batch, and what asking so many sequences' heads takes."""

    _habits: dict[tuple[Hashable, int], Habit] = field(default_factory=dict)
    _of_all: dict[int, Habit] = field(default_factory=dict)  # by size of batch: what a new adapter begins with
    _asking: dict[int, UsualCost] = field(default_factory=dict)

    def asks(self, adapter: Hashable, num_sequences: int, least_value: float = 0.0) -> bool:
        """Whether to ask this adapter's heads in this step; counts it. Untried ones are tried for a shorter time where
        only drafts of `least_value` or more pay: few are as certain."""
        return self._of(adapter, num_sequences, least_value).asks()

    def saw(self, adapter: Hashable, num_sequences: int, saved: float) -> None:
        """They were asked, and it saved so many tokens' time."""
        habit, known = self._of(adapter, num_sequences), self._of_all[_size(num_sequences)]
        known.saw(saved)
        if habit.seen < YOUNG:
            habit.saved = min(habit.saved, known.saved + HOPE)
        habit.saw(saved)

    def _of(self, adapter: Hashable, num_sequences: int, least_value: float = 0.0) -> Habit:
        size = _size(num_sequences)
        known = self._of_all.setdefault(size, Habit())
        habit = self._habits.get((adapter, size))
        if habit is None:
            habit = self._habits[adapter, size] = Habit(
                min(known.saved + HOPE, REST_BELOW + OPTIMISM * (1.0 - least_value))
            )
        return habit

    def asking(self, num_sequences: int, seconds: float) -> float:
        """Seconds that asking for so many sequences usually takes, now that it took so long."""
        return (
            self._asking.setdefault(num_sequences.bit_length(), UsualCost()).saw(seconds / num_sequences)
            * num_sequences
        )

    def forget(self, adapter: Hashable) -> None:
        """The adapter is gone."""
        for key in [key for key in self._habits if key[0] == adapter]:
            del self._habits[key]

"""The highest rate at which a server keeps its promise: doubling until it does not, then bisection."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from perseid_loadtest.traffic.record import RequestRecord, Run
from perseid_loadtest.traffic.tally import INTERRUPTED

TOLERANCE = 0.05
"""The answer is within 5 % of a rate that failed."""
MOST_TRIALS = 24
LEAST_SHARE_OF_START = 1 / 64


@dataclass(frozen=True, slots=True)
class Trial:
    """One rate, tried on its own."""

    rate: float  # requests a second
    good_share: float  # of the requests: those that met the limits
    met: bool
    run: Run


@dataclass(frozen=True, slots=True)
class Sweep:
    """All that was tried, in order, and the best of it."""

    trials: tuple[Trial, ...]
    stopped_early: str | None = None

    @property
    def best(self) -> Trial | None:
        """The highest rate that met the limits; None when none did."""
        return max((trial for trial in self.trials if trial.met), key=lambda trial: trial.rate, default=None)


def good_share(records: Sequence[RequestRecord], met_by: Callable[[RequestRecord], bool]) -> float:
    """Share of the requests that count that met the limits; a failed one did not. 0 without any."""
    counted = [record for record in records if not record.warm_up]
    return sum(map(met_by, counted)) / len(counted) if counted else 0.0


async def find_highest_rate(
    run_at: Callable[[float, int], Awaitable[Run]],
    met_by: Callable[[RequestRecord], bool],
    *,
    start: float,
    share: float = 0.99,
    tolerance: float = TOLERANCE,
    tell: Callable[[Trial], None] = lambda _: None,
) -> Sweep:
    """Try rates. `run_at(rate, trial)` makes a fresh run; a rate meets the limits when at least `share` of its
    requests does. Ends when the best rate and the lowest that failed are within `tolerance`."""
    trials: list[Trial] = []
    low, high = 0.0, float("inf")  # the highest rate that met the limits, the lowest that did not
    rate = start
    while len(trials) < MOST_TRIALS and rate >= start * LEAST_SHARE_OF_START:
        run = await run_at(rate, len(trials))
        part = good_share(run.records, met_by)
        trial = Trial(rate, part, part >= share and run.stopped_early is None, run)
        trials.append(trial)
        tell(trial)
        if run.stopped_early == INTERRUPTED:
            return Sweep(tuple(trials), INTERRUPTED)
        low, high = (max(low, rate), high) if trial.met else (low, min(high, rate))
        if high <= low * (1.0 + tolerance):
            break
        rate = _following(low, high)
    return Sweep(tuple(trials))


def _following(low: float, high: float) -> float:
    """Twice as much while all succeeds, half as much while nothing does, else halfway."""
    if high == float("inf"):
        return 2.0 * low
    return high / 2.0 if low == 0.0 else (low + high) / 2.0

"""What plots show: cumulative shares, and figures over the time of a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from perseid_loadtest.analysis.latencies import answered, tokens_of, tpot
from perseid_loadtest.analysis.summary import measured
from perseid_loadtest.traffic.record import RequestRecord, Run

MOST_POINTS = 400
"""Of a cumulative curve."""
MOST_BINS = 60
"""Of a plot over time."""
REQUESTS_PER_BIN = 4
"""At least, on average: with fewer, lines jump between nothing and one request."""

Points = list[tuple[float, float]]
"""(moment in s, value) in the order of the records."""


@dataclass(frozen=True, slots=True)
class Bins:
    """Equal spans of a run's time, `count` of `width` seconds from `start`."""

    start: float
    width: float
    count: int

    @classmethod
    def of(cls, records: Sequence[RequestRecord]) -> Self:
        """From the first planned request to the last end; as many spans as the requests are enough for."""
        start = min((record.planned for record in records), default=0.0)
        length = max(max((record.ended for record in records), default=0.0) - start, 0.1)
        count = max(1, min(MOST_BINS, int(length / 0.1), len(records) // REQUESTS_PER_BIN))
        return cls(start, length / count, count)

    @property
    def middles(self) -> list[float]:
        """The moment in the middle of each, s."""
        return [round(self.start + (place + 0.5) * self.width, 6) for place in range(self.count)]

    def sums(self, points: Points) -> list[float]:
        """What the values of each span add up to, a second."""
        sums = [0.0] * self.count
        for moment, value in points:
            sums[self._place(moment)] += value
        return [value / self.width for value in sums]

    def percentiles(self, points: Points, q: float) -> list[float | None]:
        """Of the values of each span; None where it has none."""
        held: list[list[float]] = [[] for _ in range(self.count)]
        for moment, value in points:
            held[self._place(moment)].append(value)
        return [float(np.percentile(values, q)) if values else None for values in held]

    def _place(self, moment: float) -> int:
        return min(max(int((moment - self.start) / self.width), 0), self.count - 1)


def cumulative(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """The values in order and the share, in percent, that is at most each; thinned where there are many."""
    ordered = np.sort(np.asarray([value for value in values if np.isfinite(value)], dtype=np.float64))
    if ordered.size == 0:
        return [], []
    places = np.unique(np.linspace(0, ordered.size - 1, min(ordered.size, MOST_POINTS)).astype(int))
    return ordered[places].tolist(), (100 * (places + 1) / ordered.size).tolist()


def good_records(run: Run) -> list[RequestRecord]:
    """The measured requests that were answered."""
    return [record for record in measured(run) if answered(record)]


def ttft_points(run: Run) -> Points:
    """TTFT, s, at the planned arrival."""
    return [(record.planned, record.ttft) for record in good_records(run) if record.ttft is not None]


def itl_points(run: Run) -> Points:
    """The gap before a chunk, s, when the chunk came."""
    return [
        (later.moment, later.moment - earlier.moment)
        for record in good_records(run)
        for earlier, later in zip(record.arrivals, record.arrivals[1:], strict=False)
    ]


def tpot_points(run: Run) -> Points:
    """TPOT, s, when the answer ended."""
    return [(record.ended, value) for record in good_records(run) if (value := tpot(record)) is not None]


def e2e_points(run: Run) -> Points:
    """End to end, s, at the planned arrival."""
    return [(record.planned, record.latency) for record in good_records(run)]


def token_points(run: Run) -> Points:
    """Output tokens when they came; of an answer whose chunks were not kept, at its end."""
    points: Points = []
    for record in good_records(run):
        came = [(arrival.moment, arrival.tokens) for arrival in record.arrivals]
        points += came or [(record.ended, float(tokens_of(record)))]
    return points

"""Two scrapes of one server: what its counters and histograms took on between them."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

PREFIXES = ("perseid_", "vllm:")
_UPPER = re.compile(r'[{,]le="([^"\\]*)"')


@dataclass(frozen=True, slots=True)
class Scrape:
    """One reading of /metrics."""

    samples: Mapping[str, float] = field(default_factory=dict)  # name{labels} → value
    failure: str | None = None  # why there are none
    is_absent: bool = False  # because the server has none to read


def untold(before: Scrape, after: Scrape) -> str | None:
    """Why nothing can be said by the server's own figures. None where it can, and where the server just has none."""
    if before.is_absent and after.is_absent:
        return None
    return before.failure or after.failure


@dataclass(frozen=True, slots=True)
class HistogramFigures:
    """A histogram's, seconds. Quantiles are Prometheus' `histogram_quantile`: on the straight line within a bucket, and
    the largest finite bound where they lie beyond it."""

    count: int
    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None


class Difference:
    """What metrics show between two scrapes, summed over labels. Names come without their prefix; of several the first
    that is there counts. None: not there."""

    def __init__(self, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        self._after = after
        self._grown = {key: _grown(before.get(key, 0.0), value) for key, value in after.items()}
        self._keys: dict[str, list[str]] = defaultdict(list)
        for key in after:
            self._keys[key.partition("{")[0]].append(key)

    def counter(self, *names: str) -> float | None:
        """By how much it grew."""
        keys = self._find(names)
        return sum(self._grown[key] for key in keys) if keys else None

    def gauge_sum(self, *names: str) -> float | None:
        """At the second scrape, over all labels (vLLM's are engines)."""
        keys = self._find(names)
        return sum(self._after[key] for key in keys) if keys else None

    def gauge_mean(self, *names: str) -> float | None:
        """As `gauge_sum`, of a share."""
        keys = self._find(names)
        return sum(self._after[key] for key in keys) / len(keys) if keys else None

    def share(self, part: str, whole: str) -> float | None:
        """By how much one counter grew for each that another did. None where that one stood still."""
        grown, of = self.counter(part), self.counter(whole)
        return grown / of if grown is not None and of else None

    def histogram(self, *names: str) -> HistogramFigures | None:
        """None also where nothing was observed."""
        for name in names:
            keys = self._find([f"{name}_bucket"])
            if keys:
                return self._histogram(name, keys)
        return None

    def _histogram(self, name: str, keys: Sequence[str]) -> HistogramFigures | None:
        upto: dict[float, float] = defaultdict(float)
        for key in keys:
            upper = _upper(key)
            if upper is not None:
                upto[upper] += self._grown[key]
        buckets = sorted(upto.items())
        count = buckets[-1][1] if buckets else 0.0
        if count <= 0:
            return None
        total = self.counter(f"{name}_sum")
        p50, p90, p99 = (quantile(buckets, q) for q in (0.5, 0.9, 0.99))
        return HistogramFigures(round(count), None if total is None else total / count, p50, p90, p99)

    def _find(self, names: Sequence[str]) -> list[str]:
        known = (prefix + name for name in names for prefix in PREFIXES)
        return next((self._keys[name] for name in known if name in self._keys), [])


def quantile(buckets: Sequence[tuple[float, float]], q: float) -> float | None:
    """The q-quantile of (upper bound, how many are at most that), sorted; the first bucket begins at 0. None where all
    lie beyond every finite bound."""
    rank = q * buckets[-1][1]
    lower, below = 0.0, 0.0
    for upper, upto in buckets:
        if upto >= rank and upto > below:
            if math.isinf(upper):
                break
            return lower + (upper - lower) * max(rank - below, 0.0) / (upto - below)
        if math.isfinite(upper):
            lower, below = upper, max(upto, below)
    return lower or None


def _grown(before: float, after: float) -> float:
    """A counter that fell was set back by a restart, and has counted from 0 since."""
    return after if after < before else after - before


def _upper(key: str) -> float | None:
    found = _UPPER.search(key)
    try:
        return float(found[1]) if found else None
    except ValueError:
        return None

"""A figure's mean, percentiles and largest value, and how even several figures are."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np


@dataclass(frozen=True, slots=True)
class Distribution:
    """Many values of one figure, seconds. Percentile q is the value at rank q · (count − 1) / 100 of the sorted values,
    between two neighbours on the straight line (numpy's default, Hyndman and Fan's type 7)."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Self | None:
        """None of no values. What is not finite was not measured and is left out."""
        kept = np.fromiter(values, dtype=np.float64)
        kept = kept[np.isfinite(kept)]
        if kept.size == 0:
            return None
        p50, p90, p99 = np.percentile(kept, (50, 90, 99))
        # A mean of equal values may come out one rounding beyond them.
        mean = min(max(float(kept.mean()), float(kept.min())), float(kept.max()))
        return cls(int(kept.size), mean, float(p50), float(p90), float(p99), float(kept.max()))


def jain_index(values: Iterable[float]) -> float | None:
    """(Σ x)² / (n · Σ x²): 1 where all n values are equal, 1/n where one has everything. None of fewer than two values.

    Jain, Chiu and Hawe: A quantitative measure of fairness and discrimination, DEC TR-301, 1984.
    """
    kept = [value for value in values if math.isfinite(value)]
    if len(kept) < 2:
        return None
    largest = max(abs(value) for value in kept)
    if largest == 0.0:
        return 1.0  # all equal
    scaled = [value / largest for value in kept]  # squares of tiny values would be 0
    return min(1.0, sum(scaled) ** 2 / (len(scaled) * sum(value * value for value in scaled)))

"""What a step of so many rows takes, as measured. Standard library only."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence

FAST, SLOW = 0.1, 0.02
"""How quickly the whole curve follows a new measurement, and how quickly its shape does."""

WIDEST = 2.0
"""A measurement that is further off than by this factor is taken to be off by it: something else ran."""


class StepClock:
    """seconds(rows) = pace · curve(rows). The curve is measured at start (or taken to be a straight line); the pace
    follows what else the machine does and how long contexts are. Plain steps and steps with trees have a curve each,
    and the pace in common."""

    def __init__(self, measured: Mapping[int, float]) -> None:
        """`measured`: seconds of plain steps, by rows; one point at least."""
        if not measured or min(measured.values()) <= 0.0:
            raise ValueError("a clock is set by one measured step at least, and none takes no time")
        self._rows = tuple(sorted(measured))
        plain = [measured[rows] for rows in self._rows]
        for place in range(1, len(plain)):  # noise: more rows take no less
            plain[place] = max(plain[place], plain[place - 1])
        self._curves = {False: plain, True: list(plain)}
        self._pace = 1.0

    def seconds(self, rows: int, *, trees: bool) -> float:
        """What a step is going to take."""
        return self._pace * self._at(self._curves[trees], rows)

    def saw(self, rows: int, seconds: float, *, trees: bool) -> None:
        """A step of so many rows took so long."""
        curve = self._curves[trees]
        ratio = min(max(seconds / self.seconds(rows, trees=trees), 1.0 / WIDEST), WIDEST)
        before, after = self._neighbours(rows)
        bend = 1.0 + SLOW * (ratio - 1.0)
        for place in {before, after}:
            share = (
                1.0
                if before == after
                else 1.0 - abs(self._rows[place] - rows) / (self._rows[after] - self._rows[before])
            )
            curve[place] *= 1.0 + (bend - 1.0) * min(max(share, 0.0), 1.0)
        self._pace *= 1.0 + FAST * (ratio - 1.0)

    def _at(self, curve: Sequence[float], rows: int) -> float:
        """Interpolated; a straight line through the last two points, or through the origin, beyond them."""
        before, after = self._neighbours(rows)
        if before == after:
            return curve[before]
        first, last = self._rows[before], self._rows[after]
        return curve[before] + (curve[after] - curve[before]) * (rows - first) / (last - first)

    def _neighbours(self, rows: int) -> tuple[int, int]:
        if len(self._rows) == 1:
            return 0, 0
        after = min(max(bisect_left(self._rows, rows), 1), len(self._rows) - 1)
        if self._rows[after] == rows:
            return after, after
        return after - 1, after

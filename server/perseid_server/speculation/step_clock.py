"""What a step of so many rows takes, as measured. Standard library only."""

from bisect import bisect_left
from collections.abc import Mapping

FAST, SLOW = 0.1, 0.02
"""How quickly the whole curve follows a new measurement, and how quickly its shape does."""

SLOWEST = 64.0
"""The pace stays between 1 / SLOWEST and SLOWEST times that of the start."""

WIDEST = 2.0
"""A measurement that is further off than by this factor is taken to be off by it: something else ran."""


class StepClock:
    """seconds(rows) = pace · curve(rows). The curve is measured at start (or taken to be a straight line); the pace
    follows what else the machine does and how long contexts are. Plain steps and steps with trees have a curve each,
    and the pace in common."""

    def __init__(self, plain: Mapping[int, float], trees: Mapping[int, float] | None = None) -> None:
        """Seconds by rows, of plain steps and of steps with trees; one point each at least. None: as plain steps."""
        self._curves = {False: _Curve(plain), True: _Curve(plain if trees is None else trees)}
        self._pace = 1.0

    def seconds(self, rows: int, *, trees: bool) -> float:
        """What a step is going to take."""
        return self._pace * self._curves[trees].at(rows)

    def saw(self, rows: int, seconds: float, *, trees: bool) -> None:
        """A step of so many rows took so long."""
        ratio = min(max(seconds / self.seconds(rows, trees=trees), 1.0 / WIDEST), WIDEST)
        self._curves[trees].bend(rows, SLOW * (ratio - 1.0))
        self._pace = min(max(self._pace * (1.0 + FAST * (ratio - 1.0)), 1.0 / SLOWEST), SLOWEST)


class _Curve:
    """Points, and lines between them. More rows take no less: what is measured otherwise is noise."""

    def __init__(self, measured: Mapping[int, float]) -> None:
        if not measured or min(measured.values()) <= 0.0:
            raise ValueError("a clock is set by one measured step at least, and none takes no time")
        self._rows = tuple(sorted(measured))
        self._seconds = [measured[rows] for rows in self._rows]
        self._straighten(0)

    def at(self, rows: int) -> float:
        """Interpolated; beyond the points a straight line through the two that are nearest."""
        before, after = self._neighbours(rows)
        if before == after:
            return self._seconds[before]
        first, last = self._rows[before], self._rows[after]
        slope = (self._seconds[after] - self._seconds[before]) / (last - first)
        return self._seconds[before] + slope * (rows - first)

    def bend(self, rows: int, by: float) -> None:
        """The points beside so many rows grow by this share, each as near as it is."""
        before, after = self._neighbours(rows)
        for place in {before, after}:
            share = (
                1.0
                if before == after
                else 1.0 - abs(self._rows[place] - rows) / (self._rows[after] - self._rows[before])
            )
            if rows > self._rows[-1]:
                share = float(place == after)  # what lies beyond is told by the last point
            self._seconds[place] *= 1.0 + by * min(max(share, 0.0), 1.0)
        self._straighten(after)

    def _straighten(self, fixed: int) -> None:
        """Let no point be above a later one, point `fixed` staying as it is."""
        for place in range(fixed + 1, len(self._seconds)):
            self._seconds[place] = max(self._seconds[place], self._seconds[place - 1])
        for place in range(fixed - 1, -1, -1):
            self._seconds[place] = min(self._seconds[place], self._seconds[place + 1])

    def _neighbours(self, rows: int) -> tuple[int, int]:
        if len(self._rows) == 1:
            return 0, 0
        after = min(max(bisect_left(self._rows, rows), 1), len(self._rows) - 1)
        if self._rows[after] == rows:
            return after, after
        return after - 1, after

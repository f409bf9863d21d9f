"""How fast work leaves, and so when it is worth to ask again."""

import math
import random
import time
from collections.abc import Callable

WINDOW_S = 20.0
FIRST_GUESS_S = 2.0  # before anything has left
SHORTEST_S, LONGEST_S = 1.0, 60.0
_JITTER = 0.15  # so that those who are refused together do not come back together


class DrainRate:
    """Tokens that leave in a second: an exponentially weighted mean of the last `WINDOW_S` seconds or so.

    S ← S · exp(−Δt / W) + tokens        rate = S / (W · (1 − exp(−age / W)))

    Time counts only while there is something that could leave: an idle minute says nothing of how fast that goes.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, draw: Callable[[], float] = random.random) -> None:
        """`draw` gives numbers in [0, 1)."""
        self._clock = clock
        self._draw = draw
        self._busy_since: float | None = None
        self._busy_s = 0.0  # before that
        self._seen = 0.0  # in busy seconds
        self._sum = 0.0

    def begin(self) -> None:
        """There is something in progress now."""
        if self._busy_since is None:
            self._busy_since = self._clock()

    def rest(self) -> None:
        """There is nothing in progress now."""
        self._busy_s, self._busy_since = self._now(), None

    def left(self, tokens: int) -> None:
        """So much has left now."""
        self._sum = self._decayed() + tokens
        self._seen = self._now()

    @property
    def tokens_per_s(self) -> float:
        """0 before anything has left."""
        age = max(self._now(), 1.0)
        return self._decayed() / (WINDOW_S * -math.expm1(-age / WINDOW_S))

    def retry_after_s(self, tokens: int) -> float:
        """When half of `tokens` will have left, in [SHORTEST_S, LONGEST_S]: some wait less and some more."""
        rate = self.tokens_per_s
        wait_s = 0.5 * tokens / rate if rate > 0.0 else FIRST_GUESS_S
        spread = 1.0 + _JITTER * (2.0 * self._draw() - 1.0)
        return min(max(wait_s * spread, SHORTEST_S), LONGEST_S)

    def _decayed(self) -> float:
        return self._sum * math.exp(-(self._now() - self._seen) / WINDOW_S)

    def _now(self) -> float:
        return self._busy_s + (0.0 if self._busy_since is None else self._clock() - self._busy_since)

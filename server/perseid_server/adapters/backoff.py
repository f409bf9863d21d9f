"""When a load that failed for a moment is tried again. Standard library only."""

import math
from dataclasses import dataclass

FIRST_RETRY_S, LAST_RETRY_S = 1.0, 60.0


@dataclass(slots=True)
class Backoff:
    """After a second, then after twice as long each time, up to a minute."""

    _wait_s: float = FIRST_RETRY_S  # after the next failure
    _until: float = -math.inf

    def failed(self, now: float) -> None:
        """Wait, longer than the last time."""
        self._until = now + self._wait_s
        self._wait_s = min(2 * self._wait_s, LAST_RETRY_S)

    def is_over(self, now: float) -> bool:
        """Whether to try again."""
        return self._until <= now

    def left_s(self, now: float) -> float:
        """How long till then."""
        return max(self._until - now, 0.0)

    def reset(self) -> None:
        """It went well, or begins anew."""
        self._wait_s, self._until = FIRST_RETRY_S, -math.inf


def soonest(*waits_s: float | None) -> float | None:
    """The shortest wait; None where there is none."""
    return min((wait for wait in waits_s if wait is not None), default=None)

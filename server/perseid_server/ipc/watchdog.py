"""Whether an engine still goes on, judged by its pulse.

A pulse that stands still for longer than the limit of its phase means a step that hangs, or a process that was stopped.
Only time that was watched counts: where the watcher itself was held up (the machine slept, the terminal stopped the
whole group) the engine may have been too, and is not to blame. An engine that waits for work is asked for a beat now
and then, so that one that cannot take work is found before a request is.
"""

from dataclasses import dataclass
from typing import Literal

from perseid_server.ipc.pulse import Beat, Phase

PATIENCE = 30
"""While it starts, or compiles kernels, an engine may take so many times as long as for a step."""

_LOOKS = 10  # in the time that a step may take
_LONGEST_INTERVAL_S = 1.0
_PING_AFTER = 0.25  # of the time that a step may take

Verdict = Literal["fine", "ping", "stuck"]


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a pulse may stand still, in s; None: for ever."""

    step_s: float | None

    def of(self, phase: Phase) -> float | None:
        """The limit of a phase."""
        if self.step_s is None:
            return None
        return self.step_s * (PATIENCE if phase in (Phase.STARTING, Phase.COMPILING) else 1)

    @property
    def interval_s(self) -> float:
        """Time between two looks."""
        return _LONGEST_INTERVAL_S if self.step_s is None else min(self.step_s / _LOOKS, _LONGEST_INTERVAL_S)


class Watchdog:
    """Watches one engine process. Knows no clock: times are those its caller looks at."""

    def __init__(self, limits: Limits, now: float) -> None:
        self._limits = limits
        self._looked = now
        self._count = -1
        self._still_s = 0.0
        self._pinged = False

    def look(self, beat: Beat, now: float) -> Verdict:
        """Judge the pulse. "ping": send a message that makes a living engine beat."""
        watched = min(now - self._looked, 2 * self._limits.interval_s)
        self._looked = now
        if beat.count != self._count:
            self._count, self._still_s, self._pinged = beat.count, 0.0, False
            return "fine"
        self._still_s += watched
        limit = self._limits.of(beat.phase)
        if limit is None:
            return "fine"
        if beat.phase is Phase.WAITING and not self._pinged:
            self._pinged = self._still_s >= _PING_AFTER * limit
            return self._ask() if self._pinged else "fine"
        return "stuck" if self._still_s >= limit else "fine"

    def _ask(self) -> Verdict:
        self._still_s = 0.0
        return "ping"

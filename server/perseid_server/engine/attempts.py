"""Steps that fail, and what is given up for them.

A step that fails as a whole costs its newest sequence, not the process (of those that read their prompt, if there are
any: they take most). The next step computes the same rows again without it, and starts nobody, so that those who run go
on whatever waits. When step after step fails the device is broken, not a request: the error goes up, the process ends,
and its supervisor starts another. Want of memory is no sign of that, however often it comes: each time what took most
is given up. Only where a step of few rows has none, or large ones have none time and again and not one goes well in
between, something else has taken it for good.
"""

import logging
import time
from dataclasses import dataclass

from perseid_server.engine.messages import ErrorKind
from perseid_server.engine.ports import ChunkResult, Runner, ScheduledStep
from perseid_server.engine.sequence import Sequence

logger = logging.getLogger(__name__)

MOST_FAILED_STEPS = 8
"""So many steps that fail one after the other end the engine."""

FEW_ROWS = 64
"""A step of so few rows has memory wherever anything can run."""

MOST_STARVED_STEPS = 32
"""So many steps of more rows that have no memory, with none of such a size that goes well between, end the engine."""

_WORDS = ("out of memory", "allocate memory", "status_alloc_failed")


@dataclass(frozen=True, slots=True)
class Loss:
    """Who is given up for a step that failed, and what it is told."""

    sequence: Sequence
    error: str
    kind: ErrorKind = "failed"


class Attempts:
    """Runs steps, and counts those that fail."""

    def __init__(self) -> None:
        self._num_failed = 0  # in a row
        self._num_blamed = 0  # of these, on the device
        self._num_starved = 0  # large ones without memory, since the last large one that went well

    @property
    def last_failed(self) -> bool:
        """Whether the last step did."""
        return self._num_failed > 0

    def run(self, runner: Runner, step: ScheduledStep) -> tuple[tuple[ChunkResult, ...], Loss | None]:
        """What a step of some chunks brings, or who is given up for it. Raises what the step did when that ends the
        engine."""
        now = time.perf_counter()
        for chunk in step.chunks:
            if chunk.sequence.scheduled_at is None:
                chunk.sequence.scheduled_at = now
        try:
            results = runner.run(step)
        except Exception as error:  # out of memory, a broken kernel: whatever it is, the others go on
            self._num_failed += 1
            is_starved = is_out_of_memory(error) and step.num_rows > FEW_ROWS
            self._num_starved += is_starved
            self._num_blamed += not is_starved
            if self._num_blamed == MOST_FAILED_STEPS or self._num_starved == MOST_STARVED_STEPS:
                raise
            newest = max(step.chunks, key=lambda chunk: (chunk.count > 1, chunk.sequence.rank)).sequence
            logger.exception("a step failed; request %s is given up", newest.id)
            return (), _loss(newest, error)
        self._num_failed = self._num_blamed = 0
        if step.num_rows > FEW_ROWS:
            self._num_starved = 0
        return results, None


def is_out_of_memory(error: Exception) -> bool:
    """Allocators of torch raise RuntimeErrors, some with a name of their own; so do the libraries that it calls."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(words in said for words in _WORDS)


def _loss(sequence: Sequence, error: Exception) -> Loss:
    if not is_out_of_memory(error):
        return Loss(sequence, f"the step failed: {type(error).__name__}")
    told = (
        "the engine ran out of memory in a step, and this request, which began last, was given up for the others "
        f"({type(error).__name__}); try again, or send a shorter prompt"
    )
    return Loss(sequence, told, "unavailable")

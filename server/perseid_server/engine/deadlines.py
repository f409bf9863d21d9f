"""When sequences must have ended. Looking whether one is late costs nothing while none is."""

from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from perseid_server.engine.sequence import Sequence

_SLACK = 64


class Deadlines:
    """The deadlines of sequences that have not ended."""

    def __init__(self) -> None:
        self._pending: dict[int, Sequence] = {}  # by arrival
        self._heap: list[tuple[float, int]] = []  # deadline, arrival; also of some that have ended

    def add(self, sequence: Sequence) -> None:
        """Watch a sequence, if it has a deadline."""
        deadline = sequence.request.deadline
        if deadline is not None:
            self._pending[sequence.arrival] = sequence
            heappush(self._heap, (deadline, sequence.arrival))

    def ended(self, sequence: Sequence) -> None:
        """Watch it no longer, if it was watched."""
        self._pending.pop(sequence.arrival, None)
        if len(self._heap) > 2 * len(self._pending) + _SLACK:  # deadlines far off must not keep those that have ended
            self._heap = [entry for entry in self._heap if entry[1] in self._pending]
            heapify(self._heap)

    def passed(self, now: float) -> Iterator[Sequence]:
        """Sequences whose deadline is over. They are watched no longer."""
        while self._heap and self._heap[0][0] <= now:
            sequence = self._pending.pop(heappop(self._heap)[1], None)
            if sequence is not None:
                yield sequence

"""What the engine process leaves where its supervisor can read it at any time, also when it hangs or has died.

    pulse   a page of shared memory: how often the loop has gone round, what it does now, and which rows it runs
    stacks  a file in memory: Python stacks, written by faulthandler at a fatal signal, or when the supervisor asks

Only the loop itself beats: a thread that did would go on while the loop hangs. A beat is three stores into memory, well
under a microsecond, and takes no system call. Times are those of the machine's monotonic clock, which both processes
share.
"""

import mmap
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

_NUM_BYTES = 1 << 16
_HEADER_BYTES = 64
_WORD = 8  # bytes


class Phase(IntEnum):
    """What the engine does."""

    STARTING = 0
    WAITING = 1  # for messages, with nothing to do
    STEPPING = 2
    COMPILING = 3  # a kernel, usually in a step


@dataclass(frozen=True, slots=True)
class Beat:
    """The pulse at one moment."""

    count: int
    phase: Phase
    since: float  # monotonic, s


@dataclass(frozen=True, slots=True)
class Running:
    """What the last step that began runs."""

    num_rows: int = 0
    request_ids: tuple[str, ...] = ()
    is_whole: bool = True  # False: there were more requests than the page has room for

    def may_be_one_of(self, request_id: str) -> bool:
        """Whether the step runs a request, or may do."""
        return request_id in self.request_ids or not self.is_whole


class Pulse:
    """The page. One process writes, the other reads; a value that is read half-written is read right the next time."""

    def __init__(self, descriptor: int) -> None:
        self._page = mmap.mmap(descriptor, _NUM_BYTES)
        self._view = memoryview(self._page)
        header = self._view[:_HEADER_BYTES]
        self._words, self._times = header.cast("Q"), header.cast("d")  # 0 count, 1 phase, 2 bytes of text; 3 since

    def beat(self, phase: Phase) -> None:
        """The loop has come to the beginning of this phase."""
        self._times[3] = time.monotonic()
        self._words[1] = phase
        self._words[0] += 1

    def read(self) -> Beat:
        """The pulse now."""
        return Beat(self._words[0], Phase(self._words[1]), self._times[3])

    def runs(self, num_rows: int, request_ids: Sequence[str]) -> None:
        """Note what a step is about to run."""
        room = _NUM_BYTES - _HEADER_BYTES
        text = "\n".join((str(num_rows), *request_ids)).encode(errors="replace")
        if len(text) > room:
            text = text[: text.rindex(b"\n", 0, room) + 1]  # an empty last line tells that some are missing
        self._words[2] = 0
        self._view[_HEADER_BYTES : _HEADER_BYTES + len(text)] = text
        self._words[2] = len(text)

    def running(self) -> Running:
        """What `runs` noted last."""
        text = bytes(self._view[_HEADER_BYTES : _HEADER_BYTES + self._words[2]]).decode(errors="replace")
        if not text:
            return Running()
        num_rows, *request_ids = text.split("\n")
        named = tuple(request_id for request_id in request_ids if request_id)
        return Running(int(num_rows), named, is_whole=len(named) == len(request_ids))

    def running_now(self) -> Running:
        """What runs; nothing between steps."""
        return self.running() if self.read().phase in (Phase.STEPPING, Phase.COMPILING) else Running()

    def close(self) -> None:
        """Unmap the page."""
        for view in (self._words, self._times, self._view):
            view.release()
        self._page.close()


class Compiling:
    """Marks compilations in the pulse. What other threads compile is not the loop's business."""

    def __init__(self, pulse: Pulse) -> None:
        """To be made on the loop's thread."""
        self._pulse = pulse
        self._thread = threading.get_ident()
        self._before = Phase.STARTING

    def began(self) -> None:
        """A kernel is about to be compiled."""
        if threading.get_ident() == self._thread:
            phase = self._pulse.read().phase
            self._before = self._before if phase is Phase.COMPILING else phase
            self._pulse.beat(Phase.COMPILING)

    def ended(self) -> None:
        """It has been: the loop is where it was before."""
        if threading.get_ident() == self._thread:
            self._pulse.beat(self._before)


class Vitals:
    """Both, as the supervisor makes them for a new engine process."""

    def __init__(self) -> None:
        self.pulse_descriptor = _file_in_memory("perseid-pulse")
        try:
            self.stacks_descriptor = _file_in_memory("perseid-stacks")
        except BaseException:
            os.close(self.pulse_descriptor)
            raise
        os.ftruncate(self.pulse_descriptor, _NUM_BYTES)
        self.pulse = Pulse(self.pulse_descriptor)
        self.pulse.beat(Phase.STARTING)

    def stacks(self) -> str:
        """What faulthandler has written."""
        size = os.fstat(self.stacks_descriptor).st_size
        return os.pread(self.stacks_descriptor, size, 0).decode(errors="replace").strip()

    def close(self) -> None:
        """Give both back."""
        self.pulse.close()
        os.close(self.pulse_descriptor)
        os.close(self.stacks_descriptor)


def _file_in_memory(name: str) -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name)
    with tempfile.TemporaryFile() as file:  # where there is no memfd: on disk, and without a name
        return os.dup(file.fileno())

"""How much memory a server's processes hold while a run lasts.

What counts is the memory that is a process's own. Pages of files that it has mapped (code, weights) do not: how many of
them are in memory is the system's business, it takes them back as it likes, and they would hide growth beside them.
"""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

EVERY_S = 1.0
SETTLE_S = 60.0
"""Caches fill, and allocators take what they will keep; after that nothing should grow."""

_OWN = re.compile(r"^Rss(?:Anon|Shmem):\s+(\d+) kB$", re.MULTILINE)


@dataclass(slots=True)
class Watched:
    """One process and its own memory, MiB, in order."""

    name: str
    pid: int
    mib: list[float] = field(default_factory=list)
    has_ended: bool = False

    def sample(self) -> None:
        """Once more, if it is still there."""
        try:
            self.mib.append(own_mib(self.pid))
        except ProcessLookupError:
            self.has_ended = True


def processes_of(pid: int) -> tuple[Watched, ...]:
    """The API process and its engine process (Linux)."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    engines = [int(child) for child in children if "engine_process" in Path(f"/proc/{child}/cmdline").read_text()]
    return (Watched("API process", pid), *(Watched("engine process", engine) for engine in engines))


def own_mib(pid: int) -> float:
    """Of one process now. ProcessLookupError when it is gone."""
    try:
        told = _OWN.findall(Path(f"/proc/{pid}/status").read_text())
    except FileNotFoundError:
        told = []
    if not told:
        raise ProcessLookupError(pid)
    return sum(map(int, told)) / 1024


class Memory:
    """Samples of all processes."""

    def __init__(self, processes: Sequence[Watched]) -> None:
        self.processes = processes

    async def watch(self, after_s: float = SETTLE_S) -> None:
        """From so many seconds on, until cancelled."""
        await asyncio.sleep(after_s)
        while True:
            for process in self.processes:
                process.sample()
            await asyncio.sleep(EVERY_S)

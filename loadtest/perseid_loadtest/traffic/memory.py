"""How much memory a server's processes hold while a run lasts."""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

EVERY_S = 1.0
SETTLE_S = 20.0
"""Caches fill, and allocators take what they will keep; after that nothing should grow."""


@dataclass(slots=True)
class Watched:
    """One process and its resident memory, MiB, in order."""

    name: str
    pid: int
    mib: list[float] = field(default_factory=list)


def processes_of(pid: int) -> tuple[Watched, ...]:
    """The API process and its engine process (Linux)."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    engines = [int(child) for child in children if "engine_process" in Path(f"/proc/{child}/cmdline").read_text()]
    return (Watched("API process", pid), *(Watched("engine process", engine) for engine in engines))


def resident_mib(pid: int) -> float:
    """Of one process now. ProcessLookupError when it is gone."""
    try:
        match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except FileNotFoundError:
        match = None
    if match is None:
        raise ProcessLookupError(pid)
    return int(match[1]) / 1024


class Memory:
    """Samples of all processes."""

    def __init__(self, processes: Sequence[Watched]) -> None:
        self.processes = processes

    async def watch(self) -> None:
        """Until cancelled, or until a process is gone."""
        await asyncio.sleep(SETTLE_S)
        while True:
            for process in self.processes:
                process.mib.append(resident_mib(process.pid))
            await asyncio.sleep(EVERY_S)

"""Processes of a server, as the system sees them."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from tests.e2e.running import RunningServer

HANG_S = 120


def wait_for(condition: Callable[[], object], what: str = "it") -> None:
    """Return when it is so; AssertionError when it never is."""
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline, f"waited too long for {what}"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def engine_of(server: RunningServer, other_than: int = 0) -> int:
    """The engine process, as soon as there is one (another one)."""
    found: list[int] = []

    def look() -> bool:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            found[:] = [server.engine_pid()]
        return bool(found) and found[0] != other_than

    wait_for(look, "an engine process")
    return found[0]


def has_ended(server: RunningServer, *engines: int) -> int:
    """The server's exit status, when it and all these engines are gone."""
    status = server.process.wait(HANG_S)
    for engine in engines:
        wait_for(lambda engine=engine: not is_alive(engine), f"the end of engine {engine}")
    return status


def descriptors_of(server: RunningServer) -> int:
    """Open files of the API process."""
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def num_children(server: RunningServer) -> int:
    """Processes that the API process has started and not reaped."""
    pid = server.process.pid
    return len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())

"""Why an engine process ended: a word for the metrics, a sentence for the log."""

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Cause = Literal["exit", "signal", "out_of_memory", "stuck", "stopped", "protocol", "hung_up", "start"]
"""exit: it ended by itself · signal: it was killed, or crashed · out_of_memory: the system took it · stuck: a step took
too long · stopped: somebody stopped it (SIGSTOP) and let it hang · protocol: it sent what is no message · hung_up: it
closed its connection and lived on · start: it said why it cannot start."""

CAUSES: tuple[Cause, ...] = get_args(Cause)

_CRASHES = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL})


class EngineGone(Exception):
    """The engine serves no more. `cause`: where its exit status does not tell."""

    def __init__(self, text: str, cause: Cause | None = None) -> None:
        super().__init__(text)
        self.cause = cause


@dataclass(frozen=True, slots=True)
class Ending:
    """How one engine process ended."""

    cause: Cause
    text: str  # goes on after "the engine process "
    by_its_work: bool  # whether what it was running may be what ended it; a SIGKILL comes from outside


class StartFailed(Exception):
    """An engine process ended before it was ready."""

    def __init__(self, ending: Ending, stacks: str = "") -> None:
        super().__init__(ending.text)
        self.ending = ending
        self.stacks = stacks


def ending_of(gone: EngineGone, status: int | None, num_oom_kills: int) -> Ending:
    """From what its supervisor saw, its exit status, and how many processes the system has killed for want of memory
    while it lived. `status` is None where it had to be killed."""
    if gone.cause is not None:
        return Ending(gone.cause, str(gone), by_its_work=gone.cause == "stuck")
    if status is None:
        return Ending("hung_up", "closed its connection and lived on", by_its_work=False)
    if status >= 0:
        return Ending("exit", f"ended with status {status}", by_its_work=True)
    number = -status
    if number == signal.SIGKILL and num_oom_kills > 0:
        return Ending("out_of_memory", "was killed by the system, which is out of memory", by_its_work=True)
    return Ending("signal", f"was ended by {_name_of(number)}", by_its_work=number in _CRASHES)


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def num_oom_kills() -> int:
    """Processes killed for want of memory: in this process's control group where that tells, else on this machine."""
    counters = [(path, "oom_kill") for path in _memory_events()]
    for path, name in (*counters, (Path("/proc/vmstat"), "oom_kill")):
        try:
            lines = (line.split() for line in path.read_text().splitlines())
            return next(int(parts[1]) for parts in lines if len(parts) == 2 and parts[0] == name)
        except (OSError, ValueError, StopIteration):
            continue
    return 0


def _memory_events() -> list[Path]:
    """Of a control group of version 2."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    groups = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    return [Path("/sys/fs/cgroup") / group / "memory.events" for group in groups]


def is_stopped(pid: int) -> bool:
    """Whether a process stands still because somebody sent it SIGSTOP."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] == "T"

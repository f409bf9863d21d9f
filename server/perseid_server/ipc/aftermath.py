"""When an engine process has ended: why, and what it ran, is logged and told; what may have ended it is remembered."""

import logging
from collections.abc import Callable, Sequence

from perseid_server.engine.messages import Submit
from perseid_server.ipc.endings import Ending, StartFailed
from perseid_server.ipc.suspects import Suspects

logger = logging.getLogger(__name__)

MOST_NAMES = 20
"""Requests and adapters that a log line names."""


class Aftermath:
    """Of one engine process after another. Times are monotonic, in s."""

    def __init__(self) -> None:
        self._callbacks: list[Callable[[Ending], None]] = []
        self.suspects = Suspects()
        self.trouble = ""
        """How the last engine process ended, while there is no other: `was ended by SIGSEGV`."""

    def on_ending(self, callback: Callable[[Ending], None]) -> None:
        """Be told how each engine process ended that another is started for."""
        self._callbacks.append(callback)

    def ended(self, ending: Ending, stacks: str, running: Sequence[Submit], now: float) -> None:
        """A process that served has ended while it ran these."""
        self.trouble = ending.text
        logger.error("the engine process %s%s; starting it again", ending.text, _what_ran(running))
        log_stacks(stacks)
        if ending.by_its_work:
            self.suspects.crashed(running, now)
        self._tell(ending)

    def could_not_start(self, error: Exception) -> None:
        """A process that was to follow another could not serve."""
        if isinstance(error, StartFailed):
            ending, stacks = error.ending, error.stacks
        else:
            text = f"could not be started: {error or type(error).__name__}"
            ending, stacks = Ending("start", text, by_its_work=False), ""
        self.trouble = ending.text
        logger.error("the engine could not be started again: it %s", ending.text)
        log_stacks(stacks)
        self._tell(ending)

    def _tell(self, ending: Ending) -> None:
        for callback in self._callbacks:
            callback(ending)


def log_stacks(stacks: str) -> None:
    """What a process left of its stacks, if anything."""
    if stacks:
        logger.error("the engine's stacks when it ended:\n%s", stacks)


def _what_ran(requests: Sequence[Submit]) -> str:
    """For the log: ids and versions, nothing of what clients wrote."""
    if not requests:
        return ""
    versions = sorted({version[:12] for request in requests for version in request.adaptation.versions})
    adapted = f", with the adapters {_listed(versions)}" if versions else ""
    return f" in a step of the requests {_listed([request.request_id for request in requests])}{adapted}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more

"""Work that goes on though nobody waits for it any more, and work on the disk, for which no event loop may wait."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from perseid_server.errors import PerseidError, Unavailable

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


class Background:
    """Tasks of one event loop, held until they end."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, R]) -> asyncio.Task[R]:
        """Let it run."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def whole(self, change: Coroutine[Any, Any, R]) -> R:
        """What a change brings. It goes on when the caller is cancelled."""
        task = self.start(change)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_ended_unheard)
            raise


def _ended_unheard(change: asyncio.Task[Any]) -> None:
    """Nobody waits for this change any more. A refusal is no news then; a bug is logged."""
    error = None if change.cancelled() else change.exception()
    if error is not None and not isinstance(error, PerseidError):
        logger.error("a change of the adapters failed", exc_info=error)


async def on_disk(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run blocking work on the adapter store in a thread. A full or broken disk is the operator's business, and
    Unavailable to the client."""
    try:
        return await asyncio.to_thread(function, *args, **kwargs)
    except OSError as error:
        logger.exception("the adapter store failed")
        raise Unavailable(f"the adapter store failed: {error.strerror or 'input/output error'}") from error

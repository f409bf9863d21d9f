"""Long texts are tokenized in threads of their own: few at once, few bytes waiting, short ones not behind long ones.

The threads are not asyncio's, which adapters are loaded in: a thousand huge prompts hold up no load.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from perseid_server.access.caller import Caller
from perseid_server.errors import QueueFull
from perseid_server.frontend.shared_limit import SharedLimit

T = TypeVar("T")

MAX_CHARACTERS = 64 << 20  # being tokenized and waiting for it; four of the longest prompts that fit a body
_HUGE = 1 << 16  # characters; such texts take tens of milliseconds and wait for one another
_RETRY_AFTER_S = 2.0


class Tokenizing:
    """Runs the tokenizer on long texts. All methods run on one event loop."""

    def __init__(self, max_characters: int = MAX_CHARACTERS) -> None:
        self._characters = SharedLimit(max_characters)
        self._ordinary = ThreadPoolExecutor(2, "tokenizing")
        self._huge = ThreadPoolExecutor(1, "tokenizing-huge")

    @property
    def characters(self) -> int:
        """Being tokenized, and waiting for it."""
        return self._characters.total

    async def run(self, caller: Caller, length: int, work: Callable[[], T]) -> T:
        """What the work brings, which is about so many characters. QueueFull when too many wait already.

        The characters count until the thread lets go of them, also when the caller has left before.
        """
        if not (self._characters.fits(length) and self._characters.is_fair(caller, length)):
            raise QueueFull(
                f"{self._characters.total} characters of prompts wait to be tokenized, the limit is "
                f"{self._characters.limit}; try again",
                retry_after_s=_RETRY_AFTER_S,
            )
        loop = asyncio.get_running_loop()
        self._characters.take(caller, length)
        running = (self._huge if length >= _HUGE else self._ordinary).submit(work)
        running.add_done_callback(lambda _: _tell(loop, lambda: self._characters.give_back(caller, length)))
        return await asyncio.wrap_future(running)

    def close(self) -> None:
        """Take no more; what waits is dropped."""
        for pool in (self._ordinary, self._huge):
            pool.shutdown(wait=False, cancel_futures=True)


def _tell(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    """Called in whatever thread; a loop that is closed has nothing to keep count of."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(callback)

"""Ending a server whose threads still work.

A thread cannot be stopped, and asyncio and the interpreter wait for each: for hours, if it downloads or its disk is
slow. When all is closed that must be closed, the process ends without them. What they leave by halves is in the store's
tmp/, which the next start empties.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

from perseid_server.errors import PerseidError

logger = logging.getLogger(__name__)

_LAST_MOMENT_S = 0.5  # for threads that are just ending


async def without_threads(work: Coroutine[Any, Any, int]) -> int:
    """The exit status that work brings. Ends the process with it where threads that began meanwhile are busy."""
    before = set(threading.enumerate())
    threads = ThreadPoolExecutor(thread_name_prefix="perseid")
    asyncio.get_running_loop().set_default_executor(threads)
    try:
        status = await work
    except PerseidError as error:
        if _are_busy(threads, before):
            print(f"perseid: {error.message}", file=sys.stderr)
            _end(1)
        raise
    if _are_busy(threads, before):
        _end(status)
    return status


def _are_busy(threads: ThreadPoolExecutor, before: Collection[threading.Thread]) -> bool:
    threads.shutdown(wait=False, cancel_futures=True)  # those that do nothing end
    deadline = time.monotonic() + _LAST_MOMENT_S
    for thread in threading.enumerate():
        if thread not in before and not thread.daemon:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                logger.warning("a thread still works (%s); it is not waited for", thread.name)
                return True
    return False


def _end(status: int) -> NoReturn:
    for child in _children():  # a download by pip
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever read it may have left
            stream.flush()
    os._exit(status)


def _children() -> list[int]:
    """Processes that threads of this one have started."""
    found: list[int] = []
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(pid) for pid in path.read_text().split()]
    return found

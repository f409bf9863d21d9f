"""Work that is done every so many seconds in a thread of its own. Standard library only."""

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Periodically:
    """Does its work again and again from `start` to `stop`. Work that fails is logged, and done again."""

    def __init__(self, name: str, interval_s: float, work: Callable[[], None]) -> None:
        """`name`: of the thread, and in the log."""
        self._interval_s = interval_s
        self._work = work
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin, an interval from now."""
        self._thread.start()

    def stop(self) -> None:
        """End, and wait for work that is being done."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_s):
            try:
                self._work()
            except Exception:
                logger.exception("%s failed", self._thread.name)

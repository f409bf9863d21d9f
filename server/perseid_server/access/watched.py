"""Keys from a file that may change while the server runs. Standard library only."""

import logging
import stat
from functools import partial
from pathlib import Path

from perseid_server.access.followed import Followed
from perseid_server.access.key_file import read_keys
from perseid_server.access.keys import KeyRing
from perseid_server.access.periodically import Periodically

logger = logging.getLogger(__name__)

INTERVAL_S = 0.5
_Signature = tuple[int, ...] | None


class WatchedKeys:
    """Always the keys of the last file that could be read. A thread looks for changes: `start` and `stop` it."""

    def __init__(self, path: Path) -> None:
        """InvalidRequest when the file cannot be read now."""
        self._path = path
        self._file = Followed(partial(_signature, path), partial(read_keys, path), "the keys stay as they were")
        self._warn_if_open()
        self._watching = Periodically("reading the API keys again", INTERVAL_S, self.refresh)

    @property
    def ring(self) -> KeyRing:
        """The keys as of now."""
        return self._file.content

    def start(self) -> None:
        """Look for changes from now on."""
        self._watching.start()

    def stop(self) -> None:
        """End the thread."""
        self._watching.stop()

    def refresh(self) -> None:
        """Read the file again if it has changed, or could not be read. One that is wrong changes nothing."""
        before = set(self.ring.keys)
        if self._file.refresh():
            now = set(self.ring.keys)
            logger.info("API keys: %d, %d added, %d removed", len(now), len(now - before), len(before - now))
            self._warn_if_open()

    def _warn_if_open(self) -> None:
        mode = (_signature(self._path) or (0,))[0]
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            logger.warning("--api-keys %s can be used by others than its owner; chmod 600 mends it", self._path)


def _signature(path: Path) -> _Signature:
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_mode, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

"""Keys from a file that may change while the server runs. Standard library only."""

import logging
import stat
from pathlib import Path

from perseid_server.access.key_file import read_keys
from perseid_server.access.periodically import Periodically
from perseid_server.errors import InvalidRequest

logger = logging.getLogger(__name__)

INTERVAL_S = 0.5
_Signature = tuple[int, ...] | None


class WatchedKeys:
    """Always the keys of the last file that could be read. A thread looks for changes: `start` and `stop` it."""

    def __init__(self, path: Path) -> None:
        """InvalidRequest when the file cannot be read now."""
        self._path = path
        self._seen = _signature(path)
        self.ring = read_keys(path)
        self._warn_if_open()
        self._watching = Periodically("reading the API keys again", INTERVAL_S, self.refresh)

    def start(self) -> None:
        """Look for changes from now on."""
        self._watching.start()

    def stop(self) -> None:
        """End the thread."""
        self._watching.stop()

    def refresh(self) -> None:
        """Read the file again if it has changed. One that is wrong changes nothing, and is logged once."""
        signature = _signature(self._path)
        if signature == self._seen:
            return
        self._seen = signature  # taken before the file is read: what is written meanwhile is read next time
        try:
            ring = read_keys(self._path)
        except InvalidRequest as error:
            logger.error("%s; the keys stay as they were", error.message)  # noqa: TRY400  the message says it all
            return
        added, removed = set(ring.keys) - set(self.ring.keys), set(self.ring.keys) - set(ring.keys)
        logger.info("API keys: %d, %d added, %d removed", len(ring.keys), len(added), len(removed))
        self.ring = ring
        self._warn_if_open()

    def _warn_if_open(self) -> None:
        mode = (self._seen or (0,))[0]
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            logger.warning("--api-keys %s can be used by others than its owner; chmod 600 mends it", self._path)


def _signature(path: Path) -> _Signature:
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_mode, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

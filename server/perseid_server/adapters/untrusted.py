"""What a stranger's file says: read as far as a limit, parsed strictly, quoted briefly. Standard library only."""

import errno
import io
import json
import os
import stat
from pathlib import Path
from typing import Any

from perseid_server.errors import AdapterRejected, PerseidError, Unavailable, quoted

MAX_CONFIG_BYTES = 4 << 20
"""Of a configuration file, whatever it belongs to."""
_LASTING = frozenset(
    {
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENXIO,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.EACCES,
        errno.EPERM,
        errno.EINVAL,  # a place before the file's start
    }
)
"""Errors that say something of the file itself, so that the next try would meet them too."""


def unreadable(name: str, error: OSError) -> PerseidError:
    """What is told of a file that cannot be read: AdapterRejected where that lasts, otherwise Unavailable, for a disk
    that hiccups or too many open files say nothing against the file."""
    if error.errno in _LASTING:
        return AdapterRejected(f"{name} cannot be read: {error.strerror}")
    return Unavailable(f"{name} cannot be read now: {error.strerror or type(error).__name__}")


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file for reading. AdapterRejected for a pipe, which would be waited for, or a device, which may
    have no end; OSError where it cannot be opened."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AdapterRejected(f"{path.name} is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_small(path: Path, limit: int) -> bytes:
    """All of a file, and no more than `limit` bytes however it grows meanwhile. AdapterRejected for a larger one, and
    as for `open_regular`."""
    with open_regular(path) as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise AdapterRejected(f"{path.name} is larger than {limit} bytes")
    return raw


def parse_json(raw: bytes) -> Any:
    """JSON in UTF-8 that says nothing twice. ValueError says what is wrong."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_each_key_once)
        if b"\\u" in raw:  # an escape may stand for half a character, which no answer could carry
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {quoted(key)} appears twice")
        found[key] = value
    return found

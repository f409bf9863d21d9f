"""Files that are there whole or not at all."""

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write beside, sync, rename: a kill leaves the old file or the new one. A link is followed; a device or a pipe is
    written into, since a file must not take its place."""
    if _is_stream(path):
        with path.open("wb") as stream:
            stream.write(content)
        return
    target = Path(os.path.realpath(path))
    with _beside(target) as beside:
        with beside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)


def check_place(path: Path) -> None:
    """OSError where `write_whole` could not write: to be told before work that it would be lost after. Makes the
    folder."""
    if not _is_stream(path):
        with _beside(Path(os.path.realpath(path))) as beside:
            beside.touch(exist_ok=False)
    elif path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    elif not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _is_stream(path: Path) -> bool:
    """Whether something is there that is no file; a folder is told by opening it."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return not path.is_file()


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A name in the target's folder, of which nothing is left in the end."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        yield beside
    finally:
        beside.unlink(missing_ok=True)

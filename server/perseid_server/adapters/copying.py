"""Copying a stranger's file into the store. Standard library only."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from perseid_server.adapters.layout import FILES
from perseid_server.adapters.lora import why_missing
from perseid_server.adapters.sizes import check_size
from perseid_server.adapters.source import AdapterFolder
from perseid_server.adapters.untrusted import unreadable
from perseid_server.errors import AdapterRejected

_CHUNK = 1 << 20


def copy_file(folder: AdapterFolder, name: str, target: Path) -> None:
    """Copy one regular file; the copy, not the source, is what gets hashed and served."""
    source = folder.path / name
    flags = os.O_RDONLY | os.O_NONBLOCK | (0 if folder.follow_links else os.O_NOFOLLOW)
    try:
        reader = open(source, "rb", opener=lambda path, _: os.open(path, flags))  # noqa: SIM115
    except FileNotFoundError:
        raise AdapterRejected(_why_missing(folder.path, name)) from None
    except OSError as error:
        raise unreadable(name, error) from error
    with reader, target.open("xb") as writer:
        status = os.fstat(reader.fileno())
        opened = os.path.realpath(f"/proc/self/fd/{reader.fileno()}")
        if not stat.S_ISREG(status.st_mode) or not (folder.follow_links or opened == str(source)):
            raise AdapterRejected(f"{name} is not a regular file of its folder")
        check_size(name, status.st_size)
        _copy(reader, writer, status.st_size, name)
        writer.flush()
        os.fsync(writer.fileno())


def _copy(reader: BinaryIO, writer: BinaryIO, size: int, name: str) -> None:
    """As many bytes as the file had when it was opened. One that is written to meanwhile would not end."""
    left = size
    while chunk := _read(reader, min(_CHUNK, left + 1), name):
        left -= len(chunk)
        if left < 0:
            raise AdapterRejected(f"{name} grew while it was copied; load it when it is complete")
        writer.write(chunk)
    if left:
        raise AdapterRejected(f"{name} shrank while it was copied; load it when it is complete")


def _read(reader: BinaryIO, size: int, name: str) -> bytes:
    """A source that cannot be read is not the store's fault, as all else that fails here is."""
    try:
        return reader.read(size)
    except OSError as error:
        raise unreadable(name, error) from error


def _why_missing(folder: Path, name: str) -> str:
    if name in FILES["gates"]:
        return f"the gate set has no {name}; expected a folder with {' and '.join(FILES['gates'])}"
    return why_missing(folder, name)

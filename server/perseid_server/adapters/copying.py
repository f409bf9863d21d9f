"""Copying a stranger's file into the store. Standard library only."""

import os
import shutil
import stat
from pathlib import Path

from perseid_server.adapters.layout import FILES
from perseid_server.adapters.lora import why_missing
from perseid_server.adapters.source import AdapterFolder
from perseid_server.errors import AdapterRejected, TooLarge

MAX_ADAPTER_BYTES = 8 << 30
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
        raise AdapterRejected(f"{name} cannot be read: {error.strerror}") from error
    with reader, target.open("xb") as writer:
        status = os.fstat(reader.fileno())
        opened = os.path.realpath(f"/proc/self/fd/{reader.fileno()}")
        if not stat.S_ISREG(status.st_mode) or not (folder.follow_links or opened == str(source)):
            raise AdapterRejected(f"{name} is not a regular file of its folder")
        if status.st_size > MAX_ADAPTER_BYTES:
            raise TooLarge(f"{name} has {status.st_size} bytes; the limit is {MAX_ADAPTER_BYTES}")
        shutil.copyfileobj(reader, writer, _CHUNK)
        writer.flush()
        os.fsync(writer.fileno())


def _why_missing(folder: Path, name: str) -> str:
    if name in FILES["gates"]:
        return f"the gate set has no {name}; expected a folder with {' and '.join(FILES['gates'])}"
    return why_missing(folder, name)

"""The identity of model files: SHA-256 of their whole content, remembered between runs.

Hashing everything is the only sound identity (two fine-tunes may differ in a few layers only), and at about 1 GB/s
it costs a 4-bit 8B base some seconds, once: the digest is kept in the cache folder under the file's path, size,
inode and times. Change time cannot be set by users, so an edited file never meets an old digest.
"""

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from perseid_server.model.embedded import cache_folder

_DIGEST_LENGTH = 64


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of the file's content."""
    note = _note_for(path)
    if note.is_file():
        remembered = note.read_text("ascii").strip()
        if len(remembered) == _DIGEST_LENGTH:
            return remembered
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with suppress(OSError):  # a read-only cache folder costs time at the next start, nothing else
        _write(note, digest)
    return digest


def files_sha256(parts: Iterable[tuple[str, Path]], salt: str = "") -> str:
    """One hex digest for several files: SHA-256 over `salt` and sorted lines of name and content digest."""
    lines = sorted(f"{name} {file_sha256(path)}\n" for name, path in parts)
    return hashlib.sha256((salt + "\n" + "".join(lines)).encode()).hexdigest()


def _note_for(path: Path) -> Path:
    real = path.resolve()
    status = real.stat()
    identity = f"{real}|{status.st_size}|{status.st_ino}|{status.st_mtime_ns}|{status.st_ctime_ns}"
    return cache_folder() / "hashes" / hashlib.sha256(identity.encode()).hexdigest()


def _write(note: Path, digest: str) -> None:
    note.parent.mkdir(parents=True, exist_ok=True)
    temporary = note.with_suffix(f".{os.getpid()}")
    temporary.write_text(digest, "ascii")
    temporary.replace(note)

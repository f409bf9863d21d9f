"""Compile the C++ sources of this folder into one shared library, once a machine.

The system's compiler does it, or that of the Python package `ziglang` where there is none.

The library lies in the user's cache folder under a name that hashes the sources, the compiler, its options and the
CPU (it is compiled for exactly that one). It is written under a temporary name and renamed, so processes that start
together do no harm. `CXX` names another compiler; `PERSEID_CACHE_DIR` another cache folder.
"""

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

logger = logging.getLogger(__name__)

_HERE = Path(__file__).parent
_OPTIONS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-pthread", "-fPIC",
            "-shared", "-fvisibility=hidden")  # fmt: skip
_COMPILE_SECONDS = 300


class BuildError(RuntimeError):
    """No library could be made; the message says why."""


def build_library() -> Path:
    """The compiled library, made now unless the cache has it. Raises BuildError."""
    compiler = _compiler()
    sources = sorted(_HERE.glob("*.cpp"))
    library = _cache_folder() / f"{_fingerprint(compiler)}.so"
    if not library.exists():
        logger.info("compiling the CPU kernels, once on this machine (a minute or two) …")
        try:
            library.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
                made = Path(scratch, library.name)
                _run([*compiler, *_OPTIONS, "-o", str(made), *map(str, sources)])
                made.replace(library)
        except OSError as error:
            raise BuildError(f"{library.parent}: {error}") from error
    return library


def _compiler() -> list[str]:
    if named := os.environ.get("CXX"):
        return shlex.split(named)
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    if find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++"]
    raise BuildError("no C++ compiler found (c++, g++, clang++ or the Python package ziglang)")


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise BuildError(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def _fingerprint(compiler: list[str]) -> str:
    digest = hashlib.sha256()
    for part in (*compiler, *_OPTIONS, _run([*compiler, "--version"]), platform.machine(), _cpu_features()):
        digest.update(part.encode() + b"\0")
    for file in sorted((*_HERE.glob("*.cpp"), *_HERE.glob("*.h"))):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:32]


def _cpu_features() -> str:
    """What tells CPUs apart that need different code, as far as the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("flags", "Features", "model name", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _cache_folder() -> Path:
    named = os.environ.get("PERSEID_CACHE_DIR")
    base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "perseid"
    return base / "native"

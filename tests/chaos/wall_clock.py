"""A wall clock that jumps, for a server's processes alone."""

import subprocess
from pathlib import Path

import pytest

from perseid_kernels.native.build import BuildError, _compiler

SOURCE = Path(__file__).with_name("wall_clock.cpp")


class WallClock:
    """Seconds off the true time, for processes that have its `environment`."""

    def __init__(self, folder: Path) -> None:
        """Compile what stands between the processes and the system; skips where there is no compiler."""
        self._told, library = folder / "clock", folder / "wall_clock.so"
        self.set(0)
        try:
            compiler = _compiler()
        except BuildError as error:
            pytest.skip(str(error))
        subprocess.run([*compiler, "-shared", "-fPIC", "-O1", "-o", library, SOURCE], check=True)
        self.environment = {"LD_PRELOAD": str(library), "PERSEID_TEST_CLOCK": str(self._told)}

    def set(self, seconds: int) -> None:
        """Jump."""
        with self._told.open("r+b" if self._told.exists() else "wb") as file:
            file.write(seconds.to_bytes(8, "little", signed=True))

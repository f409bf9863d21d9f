"""System tools that some tests talk to."""

import os
import shutil
import sys
from pathlib import Path

import pytest


def require_tool(name: str, install: str) -> str:
    """Path of a command; skips, naming it, where it is missing, and fails instead with PERSEID_REQUIRE_TOOLS=1."""
    beside_python = Path(sys.executable).parent / name
    found = str(beside_python) if beside_python.exists() else shutil.which(name)
    if found:
        return found
    message = f"needs the command {name!r} ({install})"
    if os.environ.get("PERSEID_REQUIRE_TOOLS") == "1":
        pytest.fail(message)
    pytest.skip(message)

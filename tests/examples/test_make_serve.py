"""What `make serve` starts: every example, under a name that it may have."""

import shlex
import subprocess
from pathlib import Path

from perseid_server.adapters.names import check_name

ROOT = Path(__file__).parents[2]


def named() -> dict[str, Path]:
    """NAME=FOLDER of every --adapter of the command that `make serve` would run."""
    told = subprocess.run(
        ["make", "--no-print-directory", "-n", "serve"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    command = next(line for line in told.stdout.splitlines() if "perseid serve" in line)
    words = shlex.split(command)
    pairs = [words[place + 1].split("=", 1) for place, word in enumerate(words) if word == "--adapter"]
    return {check_name(name): ROOT / folder for name, folder in pairs}


def test_every_example_is_served_under_a_name_of_its_own() -> None:
    folders = [folder for kind in ("adapters", "gates", "heads") for folder in (ROOT / "examples" / kind).iterdir()]
    assert sorted(named().values()) == sorted(folder for folder in folders if folder.is_dir())

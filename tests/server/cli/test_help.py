"""`--help` names every option with its default, and a unit where there is one."""

import dataclasses
import re
import subprocess
import sys

import pytest

from perseid_server.config import ServeConfig
from tests.server.cli.running import Perseid

ADAPTERS = ("load", "unload", "list", "show", "pin", "unpin")
COMMANDS = ["serve", "generate", "inspect", "train gates", "loadtest", *(f"adapters {name}" for name in ADAPTERS)]
UNITS = {
    "--kv-memory": "MiB", "--adapter-memory": "MiB", "--adapter-host-memory": "MiB", "--max-batch-tokens": "tokens",
    "--max-num-seqs": "sequences", "--max-model-len": "tokens", "--max-queue": "requests", "--grace": "Seconds",
    "--threads": "Threads",
}  # fmt: skip


def options(text: str) -> dict[str, str]:
    """Option → its line."""
    lines = re.findall(r"^│ +(?:\*\s+)?(--[a-z-]+.*?)\s*│$", text, re.MULTILINE)
    return {line.split()[0]: line for line in lines}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained_with_its_default(perseid: Perseid, command: str) -> None:
    done = perseid(*command.split(), "--help")
    assert (done.status, done.err) == (0, "")
    found = options(done.out)
    assert "--config" in found
    for option, line in found.items():
        if option not in {"--config", "--help", "--version"}:
            assert re.search(r"default:|\[required\]", line, re.IGNORECASE), line
            explanation = re.sub(r"--\S+|[A-Z=.]{3,}|\[.*?\]", "", line)
            assert len(explanation.split()) >= 3, line


def test_every_setting_of_the_server_is_an_option_of_serve(perseid: Perseid) -> None:
    found = options(perseid("serve", "--help").out)
    named = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(ServeConfig)}
    assert named == set(found) - {"--config"}


@pytest.mark.parametrize(("option", "unit"), UNITS.items())
def test_sizes_are_explained_with_their_unit(perseid: Perseid, option: str, unit: str) -> None:
    assert unit in options(perseid("serve", "--help").out)[option]


def test_the_list_of_commands_explains_each(perseid: Perseid) -> None:
    text = perseid("--help").out
    for name in ("serve", "generate", "adapters", "inspect", "train", "loadtest"):
        assert re.search(rf"│ {name} +\w+\W+\w+", text), text


def test_no_command_at_all_shows_the_help(perseid: Perseid) -> None:
    done = perseid()
    assert (done.status, "Commands" in done.out) == (0, True)


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "perseid_server", "--version"], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_help_needs_neither_torch_nor_the_commands() -> None:
    code = (
        "import sys\nfrom perseid_server.cli import app\napp.meta(['--help'], result_action='return_value')\n"
        "print([n for n in ('torch', 'transformers', 'grpc', 'fastapi') if n in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"

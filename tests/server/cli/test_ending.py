"""A process whose threads work for hours ends when its work is done: with its status, its words and none of its
children. In processes of its own, as it ends at once."""

import os
import subprocess
import sys
from pathlib import Path

from tests.chaos.processes import is_alive

SCRIPT = """
import asyncio, logging, subprocess, sys, threading, time
import uvloop
from perseid_server.cli.ending import without_threads
from perseid_server.errors import InvalidRequest

async def work():
    {work}

def run():
    logging.basicConfig()
    return uvloop.run(without_threads(work()))

{end}
"""
PLAIN = "sys.exit(run())"


def ended(work: str, end: str = PLAIN) -> "subprocess.CompletedProcess[str]":
    """How a process ended that did this."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = SCRIPT.format(work=work.replace("\n", "\n    "), end=end)
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60, env=environment
    )


def test_a_busy_thread_is_not_waited_for() -> None:
    done = ended("asyncio.ensure_future(asyncio.to_thread(time.sleep, 600))\nawait asyncio.sleep(0.01)\nreturn 7")
    assert done.returncode == 7
    assert "a thread still works" in done.stderr


def test_what_is_done_ends_as_ever() -> None:
    """Whatever would be done at the end is."""
    done = ended(
        "await asyncio.to_thread(time.sleep, 0.01)\nreturn 7", f"import atexit; atexit.register(print, 'bye')\n{PLAIN}"
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, "bye\n", "")


def test_a_refusal_is_told() -> None:
    done = ended(
        "asyncio.ensure_future(asyncio.to_thread(time.sleep, 600))\nawait asyncio.sleep(0.01)\n"
        "raise InvalidRequest('--port: no')"
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "perseid: --port: no"
    assert "Traceback" not in done.stderr


def test_children_of_threads_end_with_it(tmp_path: Path) -> None:
    child = tmp_path / "child"
    script = f"import os, time; open({str(child)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    done = ended(
        "import os\n"
        f"asyncio.ensure_future(asyncio.to_thread(subprocess.run, [sys.executable, '-c', {script!r}]))\n"
        f"while not (os.path.exists({str(child)!r}) and open({str(child)!r}).read()): await asyncio.sleep(0.01)\n"
        "return 0"
    )
    assert done.returncode == 0, done.stderr
    assert not is_alive(int(child.read_text()))

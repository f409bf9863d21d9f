"""The whole `perseid` command for tests that need real processes, ports and signals: `python -m … serve …`.

PERSEID_TEST_ENGINE names a function that builds the engine, as module:function; its answers can be computed
(`tests.fakes.expected`), and no model is loaded. Without it the real engine runs. PERSEID_TEST_BACKOFF_S bounds how
long a restart waits: tests kill the engine more often than anything else does. As long as the file
PERSEID_TEST_SLOW_DISK is there, nothing that is written reaches the disk; as long as PERSEID_TEST_SLOW_HUB is there,
no base is found; PERSEID_TEST_SLOW_HUB.waiting tells that one is looked for.
"""

import contextlib
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

from perseid_server import cli
from perseid_server.cli import serve
from perseid_server.ipc import engine_client
from perseid_server.ipc.engine_client import EngineProcess
from perseid_server.model.source import ModelSource
from tests.fakes import byte_bundle

BASE = "tiny"


def main() -> None:
    """Run the command line."""
    with contextlib.ExitStack() as stack:
        if backoff_s := os.environ.get("PERSEID_TEST_BACKOFF_S"):
            stack.enter_context(patch.object(engine_client, "LONGEST_BACKOFF_S", float(backoff_s)))
        if entry := os.environ.get("PERSEID_TEST_ENGINE"):
            for name, stand_in in _stand_ins(entry).items():
                stack.enter_context(patch.object(serve, name, stand_in))
        if held := os.environ.get("PERSEID_TEST_SLOW_DISK"):
            stack.enter_context(patch.object(os, "fsync", partial(_slow_fsync, Path(held), os.fsync)))
        cli.main()


def _stand_ins(entry: str) -> dict[str, object]:
    return {
        "EngineProcess": partial(EngineProcess, entry=entry),
        "resolve_model": _resolve_model,
        "export_tokenizer": lambda _: byte_bundle(),
    }


def _resolve_model(stated: str) -> ModelSource:
    if held := os.environ.get("PERSEID_TEST_SLOW_HUB"):
        Path(f"{held}.waiting").touch()
        while Path(held).exists():
            time.sleep(0.005)
    return ModelSource("gguf", Path("fake"), BASE, stated)


def _slow_fsync(held: Path, fsync: Callable[[int], None], descriptor: int) -> None:
    while held.exists():
        time.sleep(0.005)
    fsync(descriptor)


if __name__ == "__main__":
    main()

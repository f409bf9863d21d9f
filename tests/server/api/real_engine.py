"""A server over an engine process of its own, as in production, with the fake model."""

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from perseid_server.engine.config import EngineConfig
from perseid_server.engine.messages import EngineStats, StepOutputs
from perseid_server.ipc.engine_client import EngineProcess
from tests.server.stack import LiveStack, make_stack, serving


class Watched(EngineProcess):
    """Remembers what the last step told."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.stats = EngineStats()
        self.num_steps = 0
        self.on_step(self._saw)

    def _saw(self, step: StepOutputs) -> None:
        self.stats = step.stats
        self.num_steps += 1

    def go_on(self) -> None:
        """It always does."""


@asynccontextmanager
async def serving_process(
    folder: Path, build: str, monkeypatch: pytest.MonkeyPatch, **config: object
) -> AsyncIterator[LiveStack]:
    """Both transports over the engine that `tests.server.ipc.engines:build` makes."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[3]), *filter(None, sys.path)]))
    engine = Watched(EngineConfig(**config), entry=f"tests.server.ipc.engines:{build}", log_level="CRITICAL")
    try:
        await engine.start()
        async with serving(make_stack(folder, process=engine)) as live:
            yield live
    finally:
        await engine.stop()

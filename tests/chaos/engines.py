"""Engines of `fake_serve.py`, named as `module:function`: the fake model, at a pace that faults can fall into."""

import os
import time
from pathlib import Path

from perseid_server.engine.config import EngineConfig
from perseid_server.engine.engine import Engine
from perseid_server.engine.messages import EngineReady, StepOutputs
from tests.fakes import FakeRunner, fake_engine, fake_ready

STEP_S = 0.001
NUM_BLOCKS = 1024
MAX_MODEL_LEN = 1500


class Paced(Engine):
    """A step takes a moment, as a model's does."""

    def step(self) -> StepOutputs:
        if self.has_work:
            time.sleep(STEP_S)
        return super().step()


def build(config: EngineConfig) -> tuple[Engine, EngineReady]:
    """A thousand steps take a second."""
    engine = fake_engine(
        num_blocks=NUM_BLOCKS,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=min(config.max_num_seqs, 16),
        runner=FakeRunner(NUM_BLOCKS),
        draft_tokens=0,
    )
    engine.__class__ = Paced
    return engine, fake_ready(max_model_len=MAX_MODEL_LEN)


def build_when_told(config: EngineConfig) -> tuple[Engine, EngineReady]:
    """Its start goes on when the file PERSEID_TEST_GATE names is there; `FILE.waiting` tells that it waits."""
    gate = Path(os.environ["PERSEID_TEST_GATE"])
    Path(f"{gate}.waiting").write_text(str(os.getpid()))
    while not gate.exists():
        time.sleep(0.005)
    return build(config)


BEGINS_WHEN_TOLD = """
import os, sys, time
from pathlib import Path
if "perseid_server.ipc.engine_process" in sys.orig_argv:
    gate = Path(os.environ["PERSEID_TEST_GATE"])
    while not Path(f"{gate}.begin").exists():
        time.sleep(0.005)
"""
"""A sitecustomize.py: engine processes stand still, as the machine may let any process, before their own first line."""

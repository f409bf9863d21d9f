"""Engines for the engine process of the tests, named as `module:function`. They need no torch."""

import importlib
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from perseid_server.engine.config import EngineConfig
from perseid_server.engine.engine import Engine
from perseid_server.engine.messages import EngineReady, StepOutputs
from perseid_server.errors import InvalidRequest
from perseid_server.ipc.codec import from_engine
from tests.fakes import FakeRunner, fake_engine, fake_ready


def build(config: EngineConfig) -> tuple[Engine, EngineReady]:
    """The fake engine; `max_num_seqs` of the configuration is told back as its number of pages."""
    engine = fake_engine(
        num_blocks=512,
        max_model_len=2000,
        runner=FakeRunner(512),
        max_num_seqs=config.max_num_seqs,
        max_batch_tokens=config.max_batch_tokens,
    )
    return engine, fake_ready(max_model_len=2000, adapter_pages_total=config.max_num_seqs)


class Endless(Engine):
    """Answers go on, a token at a time, until they are aborted or the process is killed."""

    def step(self) -> StepOutputs:
        time.sleep(0.001)
        return super().step()


def build_slow(config: EngineConfig) -> tuple[Engine, EngineReady]:
    """As `build`, but a thousand tokens take a second."""
    engine, ready = build(config)
    engine.__class__ = Endless
    return engine, ready


def build_refused(config: EngineConfig) -> tuple[Engine, EngineReady]:
    """A base that cannot be served."""
    raise InvalidRequest(f"no such model: {config.model}")


def build_broken(_: EngineConfig) -> tuple[Engine, EngineReady]:
    """A bug at start."""
    raise ZeroDivisionError("at start")


def build_killed(_: EngineConfig) -> tuple[Engine, EngineReady]:
    """The system takes the process away while it loads."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("it is dead")


def build_hung_up(_: EngineConfig) -> tuple[Engine, EngineReady]:
    """Closes its end of the socket, and goes on for ever."""
    os.close(int(sys.argv[1]))
    while True:
        signal.pause()


def build_once(config: EngineConfig) -> tuple[Engine, EngineReady]:
    """Starts the first time, and each time a file named by the configuration's model is there; else dies."""
    path = Path(config.model)
    if not path.exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return build_slow(config)


class Garbled(Engine):
    """Sends what is no message."""

    def step(self) -> StepOutputs:
        return replace(super().step(), iteration_tokens="many" if self.has_work else 0)  # type: ignore[arg-type]


def build_garbled(config: EngineConfig) -> tuple[Engine, EngineReady]:
    """An engine whose first step is told in another shape."""
    engine, ready = build(config)
    engine.__class__ = Garbled
    return engine, ready


POISON, HANG, ABORT = 66, 67, 68
"""Tokens: of a prompt that begins with one of them the engine of `build_poisoned` ends, hangs, or crashes."""


class Poisoned(FakeRunner):
    """Dies, or hangs, of some prompts."""

    def run(self, step):
        first = {chunk.sequence.request.prompt_token_ids[0] for chunk in step.chunks}
        if POISON in first:
            os._exit(3)
        if ABORT in first:
            os.abort()
        while HANG in first:
            time.sleep(1)
        return super().run(step)


def build_poisoned(config: EngineConfig) -> tuple[Engine, EngineReady]:
    """As `build`, over a runner that some prompts are too much for."""
    engine, ready = build(config)
    engine._runner = Poisoned(512)
    return engine, ready


class Compiler(FakeRunner):
    """In its first step it compiles a kernel, until a file is there."""

    until = Path()

    def run(self, step):
        if not self.steps:
            compiles(lambda: _wait_for(self.until))
        return super().run(step)


def compiles(work: Callable[[], object]) -> None:
    """What Triton does around a compilation."""
    runtime = sys.modules["triton"].knobs.runtime
    assert not runtime.jit_cache_hook(key="k", already_compiled=False)
    work()
    runtime.jit_post_compile_hook(key="k", already_compiled=False)


def _wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.005)


def build_compiling(config: EngineConfig) -> tuple[Engine, EngineReady]:
    """An engine with Triton, whose first step compiles until the file is there that the configuration names; then some
    prompts are too much for it."""
    importlib.import_module("triton")
    engine, ready = build_poisoned(config)

    class PoisonedCompiler(Compiler, Poisoned):
        until = Path(config.model)

    engine._runner = PoisonedCompiler(512)
    return engine, ready


def build_aborted(_: EngineConfig) -> tuple[Engine, EngineReady]:
    """Crashes as it starts."""
    os.abort()


def build_aborted_later(config: EngineConfig) -> tuple[Engine, EngineReady]:
    """Crashes as it starts, unless the file that the configuration names is there."""
    return build(config) if Path(config.model).exists() else build_aborted(config)


def build_endless(_: EngineConfig) -> tuple[Engine, EngineReady]:
    """Never comes to an end with its start."""
    while True:
        signal.pause()


def build_talkative(config: EngineConfig) -> tuple[Engine, EngineReady]:
    """Says that it is ready once too often."""
    engine, ready = build(config)
    engine.__class__ = Talkative
    return engine, ready


class Talkative(Engine):
    """Greets again when it has work."""

    def step(self) -> StepOutputs:
        if self.has_work:
            os.write(int(sys.argv[1]), from_engine.encode(fake_ready()))
        return super().step()


class Forgetful(FakeRunner):
    """Looks back as far as any test compares answers, and no further: long answers cost little."""

    def _context(self, sequence, places):
        return super()._context(sequence, places) if len(places) < 64 else (len(places),)


def build_long(config: EngineConfig) -> tuple[Engine, EngineReady]:
    """Room for many answers of thousands of tokens, quickly made."""
    num_blocks = 40_000
    engine = fake_engine(
        num_blocks=num_blocks,
        max_model_len=4000,
        max_num_seqs=config.max_num_seqs,
        max_batch_tokens=config.max_batch_tokens,
        runner=Forgetful(num_blocks),
    )
    return engine, fake_ready(max_model_len=4000)

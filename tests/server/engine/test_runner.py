"""Which steps are replayed and which run in the ordinary way, in an engine that is built for a backend that records.

The backend is Triton's, through its interpreter.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from perseid_server.adapters.store import version_of
from perseid_server.engine import build
from perseid_server.engine.adaptation import Adaptation
from perseid_server.engine.config import EngineConfig
from perseid_server.engine.engine import Engine
from perseid_server.engine.messages import Submit
from perseid_server.engine.ports import ScheduledStep
from perseid_server.engine.runner import ModelRunner
from perseid_server.model.batch import HostBatch
from perseid_server.model.decode_graphs import DecodeGraphs
from perseid_server.model.decoder import Decoder
from perseid_server.model.sampling_params import SamplingParams
from perseid_server.speculation.options import Speculation
from tests.server.model.passes import backend_named
from tests.server.model.tiny import opened, random_prompt, write_tiny
from tests.server.stack import write_adapter

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # what padding rows compute is anything


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "eos_token_id": 319}
    return write_tiny(tmp_path_factory.mktemp("runner") / "base", "llama", torch.bfloat16, **small)


@pytest.fixture
def built(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    """Builds an engine for a backend, by name."""

    def make(backend: str = "triton", **options: Any) -> Engine:
        monkeypatch.setattr(build, "backend_for", lambda device, activations: backend_named(backend))
        config = EngineConfig(
            str(folder), device="cpu", kv_memory=1, adapter_memory=1, max_batch_tokens=24, max_num_seqs=3, **options
        )
        return build.build_engine(config).engine

    return make


@pytest.fixture
def adapters(folder: Path) -> dict[str, Path]:
    """Version → folder of two adapters of unequal rank."""
    spec = opened(folder).spec
    folders = [write_adapter(folder.parent / f"rank-{rank}", seed=rank, rank=rank, base=spec) for rank in (2, 17)]
    return {version_of(each): each for each in folders}


def answers(engine: Engine, adapters: dict[str, Path]) -> dict[str, tuple[int, ...]]:
    """A base request and one for each adapter; the second arrives while the first decodes, the third while the
    second is in its prefill. Greedy, but for the last."""
    for version, path in adapters.items():
        engine.register_adapter(version, str(path), pinned=True)
    while engine.is_loading:
        engine.step()
    told: dict[str, tuple[int, ...]] = {}
    late = [(name, adapter) for name, adapter in zip("bc", adapters, strict=True)]
    engine.submit(Submit("a", tuple(random_prompt(1, 2)), SamplingParams(max_tokens=12, temperature=0.0)))
    for step in range(40):
        if step in {3, 4}:
            name, adapter = late.pop(0)
            sampling = SamplingParams(max_tokens=6, temperature=0.0 if name == "b" else 0.8, seed=7)
            engine.submit(Submit(name, tuple(random_prompt(ord(name), 30)), sampling, Adaptation.of(adapter)))
        for output in engine.step().outputs:
            assert output.error is None
            told[output.request_id] = (*told.get(output.request_id, ()), *output.token_ids)
    assert not engine.has_work
    return told


def test_pure_decode_steps_are_replayed_and_no_others(
    built: Callable[..., Engine], adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[list[int]] = []
    ways: list[str] = []
    run, replayed, ordinary = ModelRunner.run, DecodeGraphs.forward, Decoder.forward

    def watched_run(self, step: ScheduledStep):
        counts.append([chunk.count for chunk in step.chunks])
        return run(self, step)

    def watched_replay(self, batch: HostBatch):
        ways.append("replayed")
        return replayed(self, batch)

    def watched_forward(self, batch, kv, pools):
        ways.append("ordinary")
        return ordinary(self, batch, kv, pools)

    engine = built()
    monkeypatch.setattr(ModelRunner, "run", watched_run)
    monkeypatch.setattr(DecodeGraphs, "forward", watched_replay)
    monkeypatch.setattr(Decoder, "forward", watched_forward)
    answers(engine, adapters)
    assert ways == ["replayed" if set(of_step) == {1} else "ordinary" for of_step in counts]
    assert any(1 in of_step and max(of_step) > 1 for of_step in counts), "no step was mixed"
    assert {len(of_step) for of_step in counts if set(of_step) == {1}} == {1, 2, 3}


def test_the_answers_are_the_same_without_graphs(built: Callable[..., Engine], adapters: dict[str, Path]) -> None:
    told = answers(built(), adapters)
    assert told == answers(built(cuda_graphs=False), adapters)
    assert {name: len(tokens) for name, tokens in told.items()} == {"a": 12, "b": 6, "c": 6}


@pytest.mark.parametrize(
    ("backend", "graphs", "logged"),
    [
        ("triton", True, ["compiled the kernels of prefill in ", "recorded 10 decode steps of up to 24 rows in "]),
        ("triton", False, ["compiled the kernels of prefill in "]),
        ("native", True, []),
        ("eager", True, []),
    ],
)
def test_only_a_backend_that_records_warms_up_and_records(
    built: Callable[..., Engine], caplog: pytest.LogCaptureFixture, backend: str, graphs: bool, logged: list[str]
) -> None:
    with caplog.at_level(logging.INFO, logger="perseid_server.model"):
        engine = built(backend, cuda_graphs=graphs)
    assert len(caplog.messages) == len(logged)
    assert all(told.startswith(begin) for told, begin in zip(caplog.messages, logged, strict=True))
    assert (engine._runner._graphs is not None) == (len(logged) == 2)


def repeated(engine: Engine) -> list[tuple[int, ...]]:
    """Three requests whose prompts repeat themselves, so that prompt lookup drafts for them; one is sampled."""
    told: dict[str, tuple[int, ...]] = {}
    for row in range(3):
        sampling = SamplingParams(max_tokens=9, temperature=0.8 if row == 2 else 0.0, seed=5)
        prompt = tuple(random_prompt(row, 4) * 2)
        engine.submit(Submit(str(row), prompt, sampling, speculation=Speculation("ngram")))
    while engine.has_work:
        for output in engine.step().outputs:
            assert output.error is None
            told[output.request_id] = (*told.get(output.request_id, ()), *output.token_ids)
    return [told[str(row)] for row in range(3)]


def test_steps_with_drafts_are_replayed(built: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts behind each sequence whether they pay or not; the answers are those of an engine that records nothing."""
    expected = repeated(built(cuda_graphs=False, draft_tokens=0))
    replayed: list[bool] = []
    ordinary: list[HostBatch] = []
    replay, upload = DecodeGraphs.forward, HostBatch.on

    def watched_replay(self, batch: HostBatch):
        replayed.append(batch.is_decode)
        return replay(self, batch)

    def watched_upload(self, device: torch.device):
        ordinary.append(self)
        return upload(self, device)

    engine = built(draft_tokens=2)
    monkeypatch.setattr(DecodeGraphs, "forward", watched_replay)
    monkeypatch.setattr(HostBatch, "on", watched_upload)
    assert repeated(engine) == expected
    assert False in replayed, "no step had a tree"
    assert not any(batch.is_tree_step for batch in ordinary)


def test_without_drafts_no_trees_are_recorded(built: Callable[..., Engine], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="perseid_server.model"):
        built(draft_tokens=0)
    assert caplog.messages[-1].startswith("recorded 6 decode steps of up to 3 rows in ")

"""A whole run on a tiny base: what it writes can be served, and a killed run ends as an uninterrupted one."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from perseid_router.gate_set import GateSet
from perseid_router.training.options import TrainingOptions
from perseid_server.adapters.store import version_of
from perseid_server.errors import Conflict, InvalidRequest
from perseid_server.training.config import GateTraining
from perseid_server.training.report import write_report
from perseid_server.training.run import Listener, train_gates
from tests.server.training.benches import Folders

STEPS = 6


def write_lines(path: Path, lines: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


@pytest.fixture
def config(tmp_path: Path, folders: Folders) -> GateTraining:
    upper = [{"prompt": f"upper {word}", "completion": word.upper()} for word in ("ab", "cd", "ef", "gh", "ij", "kl")]
    digits = [{"prompt": f"digits {n}", "completion": str(n * 7)} for n in range(8)]
    mixed = [{"segments": [{"text": "x" * n, "adapter": "upper"}, {"text": "1", "adapter": None}]} for n in (3, 4, 5)]
    generic = [{"prompt": f"hello {n}"} for n in range(6)]
    return GateTraining(
        model=str(folders.base),
        adapters=folders.adapters,
        data=(
            ("upper", write_lines(tmp_path / "upper.jsonl", upper)),
            ("digits", write_lines(tmp_path / "digits.jsonl", digits)),
            ("mixed", write_lines(tmp_path / "mixed.jsonl", mixed)),
        ),
        generic=write_lines(tmp_path / "generic.jsonl", generic),
        generic_held_out=write_lines(tmp_path / "generic_held_out.jsonl", generic[:3]),
        out=tmp_path / "out",
        held_out_share=0.2,
        options=TrainingOptions(steps=STEPS, warm_up=2),
        generic_per_step=2,
        generic_tokens=4,
        max_tokens=128,
        device="cpu",
        checkpoint_every=2,
    )


class Killed(Exception):
    """Stands for SIGKILL: nothing of the run goes on."""


def killed_after(step: int) -> Listener:
    def at(done: int) -> None:
        if done == step:
            raise Killed

    return Listener(
        stepped=lambda done, _steps, _report: at(done), joint_stepped=lambda done, _steps, _report: at(STEPS + done)
    )


def test_a_run_writes_a_gate_set_for_its_adapters(config: GateTraining, folders: Folders) -> None:
    report = train_gates(config)
    written = GateSet.read(config.out)
    assert [(column.name, column.version) for column in written.config.adapters] == [
        (name, version_of(Path(folder))) for name, folder in folders.adapters.items()
    ]
    assert (written.config.null, written.config.method, written.config.k) == (True, "trained", 2)
    assert {projection for _, projection in written.gates} == {"q_proj", "v_proj", "down_proj"}
    assert all(gate.weight.shape[0] == 3 for gate in written.gates.values())
    assert set(written.input_mean_square) == {(layer, fused) for layer in (0, 1) for fused in ("qkv", "down")}
    assert written.config.request_router is not None
    assert report["steps"] == STEPS
    assert not config.checkpoint.exists()
    assert set(report["tasks"]) == {"upper", "digits"}  # a fifth of three mixed samples is none
    assert set(report["tasks"]["upper"]) == {"base", "oracle", "auto k=1", "auto k=2"}


def test_the_report_has_its_three_files(config: GateTraining) -> None:
    pytest.importorskip("matplotlib")
    report = train_gates(config)
    write_report(report, config.out, plot=True)
    assert json.loads((config.out / "report.json").read_text())["columns"] == ["upper", "digits", "base"]
    assert "| upper |" in (config.out / "report.md").read_text()
    assert (config.out / "confusion.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("killed_at", "joint_steps"), [(1, 0), (5, 0), (6, 3), (9, 3)])
def test_a_killed_run_that_is_resumed_writes_the_same_gates(
    config: GateTraining, killed_at: int, joint_steps: int
) -> None:
    config = replace(config, joint_steps=joint_steps)
    train_gates(config)
    other = replace(config, out=config.out.with_name("other"))
    with pytest.raises(Killed):
        train_gates(other, killed_after(killed_at))
    train_gates(replace(other, resume=True))
    one, same = GateSet.read(config.out), GateSet.read(other.out)
    assert one.config.training == same.config.training
    for place, gate in one.gates.items():
        assert np.array_equal(gate.weight, same.gates[place].weight)
        assert np.array_equal(gate.bias, same.gates[place].bias)
    for place, mean_square in one.input_mean_square.items():
        assert np.array_equal(mean_square, same.input_mean_square[place])


def test_a_resumed_run_must_be_the_same_run(config: GateTraining) -> None:
    with pytest.raises(Killed):
        train_gates(config, killed_after(4))
    with pytest.raises(InvalidRequest, match="other options, data or adapters"):
        train_gates(replace(config, resume=True, options=replace(config.options, seed=1)))
    with pytest.raises(Conflict, match="--resume"):
        train_gates(config)


def test_epochs_are_rounds_through_the_largest_data_set(config: GateTraining) -> None:
    report = train_gates(replace(config, epochs=1.0, request_router=False))
    assert report["steps"] == 4  # seven of eight digits, two a step
    assert report["request_router"] is None


def test_an_adapter_without_data_is_refused(config: GateTraining) -> None:
    with pytest.raises(InvalidRequest, match="adapter 'digits' has no training data"):
        train_gates(replace(config, data=config.data[:1]))


def test_a_missing_file_is_refused_before_the_base_is_loaded(config: GateTraining) -> None:
    config = replace(config, model="no/such/model/anywhere", generic=Path("none.jsonl"))
    with pytest.raises(InvalidRequest, match=r"none\.jsonl: no such file"):
        train_gates(config)

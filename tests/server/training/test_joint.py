"""The second stage: its pass is the served one, and its loss goes down by moving gates alone."""

from dataclasses import replace

import pytest
import torch

from perseid_router.training.options import TrainingOptions
from perseid_router.training.trainer import GateTrainer
from perseid_server.errors import InvalidRequest
from perseid_server.training.gates import gates_to_train
from perseid_server.training.joint import JointTrainer
from perseid_server.training.routed import Auto, gate_table, routed_rows
from perseid_server.training.rows import lay_out
from perseid_server.training.samples import Sample, Span
from perseid_server.training.workbench import Workbench

CPU = torch.device("cpu")
TOLERANCE = 1e-4  # of float32 logits


def trainer_of(bench: Workbench) -> GateTrainer:
    """Gates that differ from row to row."""
    return GateTrainer(gates_to_train(bench), bench.null + 1, TrainingOptions(init_std=0.3, seed=3), CPU)


def joint_of(bench: Workbench, trainer: GateTrainer, k: int = 2) -> JointTrainer:
    return JointTrainer(bench, trainer, k=k, temperature=0.8, beta=0.5, null_weight=1.0)


def samples(bench: Workbench) -> list[Sample]:
    spans = [("what is this?", "an answer", 0), ("and", "that one", 1), ("the base here", "says so", bench.null)]
    return [
        Sample.of([Span(tuple(asked.encode()), column), Span(tuple(told.encode()), column, answer=True)], "t")
        for asked, told, column in spans
    ]


@pytest.mark.parametrize("k", [2, 3])
def test_the_differentiable_pass_is_the_served_one(bench: Workbench, k: int) -> None:
    trainer, asked = trainer_of(bench), samples(bench)
    rows = lay_out(asked, (), bench.block_size, lambda _: None, wanted=lambda _index, _place: True)
    routed = routed_rows(bench, Auto(gate_table(trainer), k, 0.8), len(rows.samples))
    served = bench.decoder.forward(replace(rows.host.on(CPU), routed=(routed,)), bench.kv, bench.pool)
    joint = joint_of(bench, trainer, k)
    with torch.no_grad():
        forward = joint.forward(asked)
        logits = forward.hidden_TE @ (bench.checkpoint.lm_head() or bench.checkpoint.embedding()).dequantize().T
    joint.close()
    assert (logits - served.logits_LV).abs().max() <= TOLERANCE
    assert routed.tally[:, : bench.null].sum() > 0  # adapters did act


def test_its_loss_goes_down_and_only_gates_move(bench: Workbench) -> None:
    trainer, asked = trainer_of(bench), samples(bench)
    before = {fused: weight.clone() for fused, weight in trainer.weights.items()}
    joint = joint_of(bench, trainer)
    reports = [joint.step(asked) for _ in range(40)]
    joint.close()
    assert reports[-1].language < reports[0].language
    assert reports[-1].gates < reports[0].gates
    assert all(not torch.equal(before[fused], weight) for fused, weight in trainer.weights.items())
    assert not any(weight.requires_grad for weight in trainer.weights.values())


def test_one_column_would_learn_nothing_from_the_text(bench: Workbench) -> None:
    with pytest.raises(InvalidRequest, match="k of 2 or more"):
        joint_of(bench, trainer_of(bench), k=1)

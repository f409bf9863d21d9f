"""The trainer learns what can be learnt, takes the gradient autograd takes, and resumes as if nothing had happened."""

import io

import pytest
import torch
from torch import Tensor

from perseid_router.training.accuracy import DecisionMeter
from perseid_router.training.options import TrainingOptions
from perseid_router.training.trainer import GateTrainer, mean_squares_of
from tests.router.training.toy import COLUMNS, INPUTS, LINEARS, ToyBatch, ToyFeatures

CPU = torch.device("cpu")
OPTIONS = TrainingOptions(steps=60, learning_rate=0.05, warm_up=5)


def fresh(options: TrainingOptions = OPTIONS) -> GateTrainer:
    trainer = GateTrainer(LINEARS, COLUMNS, options, CPU)
    trainer.calibrate(mean_squares_of([ToyFeatures().batch(step) for step in range(3)], LINEARS, CPU))
    return trainer


def trained(trainer: GateTrainer, until: int) -> GateTrainer:
    while trainer.num_steps < until:
        trainer.step(ToyFeatures().batch(trainer.num_steps))
    return trainer


def accuracy(trainer: GateTrainer) -> float:
    meter, batch = DecisionMeter(trainer, 2, 1.0), ToyFeatures().batch(1000)
    batch.show(lambda layer, fused, x_RK: meter.count(layer, fused, x_RK, batch.labels_R))
    return meter.decisions().accuracy


def test_a_separable_problem_is_learnt_whatever_the_scale_of_its_inputs() -> None:
    trainer = fresh()
    before = accuracy(trainer)
    first = trainer.step(ToyFeatures().batch(0))
    trained(trainer, OPTIONS.steps - 1)
    last = trainer.step(ToyFeatures().batch(59))
    assert before < 0.6
    assert accuracy(trainer) > 0.97
    assert last.loss < 0.2 < first.loss
    assert first.accuracy < 0.6 < 0.95 < last.accuracy


def test_served_gates_give_the_trained_logits_on_plain_inputs() -> None:
    trainer, x_RK = trained(fresh(), 10), ToyFeatures().batch(3).inputs[1, "qkv"]
    weight, bias = trainer.served("qkv")
    served = (x_RK @ weight[1].T + bias[1]).view(len(x_RK), 3, COLUMNS)
    torch.testing.assert_close(served, trainer.logits(1, "qkv", x_RK), rtol=1e-4, atol=1e-4)


def test_the_closed_gradient_is_autograds() -> None:
    """One step of plain AdamW on autograd's gradients, clipped in the same way, gives the same gates."""
    trainer, batch = fresh(), ToyFeatures().batch(7)
    weight = trainer.weights["qkv"].clone().requires_grad_()
    bias = trainer.biases["qkv"].clone().requires_grad_()
    optimizer = torch.optim.AdamW(
        [{"params": [weight], "weight_decay": OPTIONS.weight_decay}, {"params": [bias], "weight_decay": 0.0}],
        lr=OPTIONS.learning_rate_at(0),
        betas=(0.9, 0.99),
    )
    loss = sum(layer_loss(trainer, weight, bias, batch, layer) for layer in (0, 1))
    loss.backward()
    for layer in (0, 1):
        norm = (weight.grad[layer].square().sum() + bias.grad[layer].square().sum()).sqrt()
        weight.grad[layer] /= max(1.0, float(norm) / OPTIONS.clip)
        bias.grad[layer] /= max(1.0, float(norm) / OPTIONS.clip)
    optimizer.step()
    trainer.step(batch)
    torch.testing.assert_close(trainer.weights["qkv"], weight.detach())
    torch.testing.assert_close(trainer.biases["qkv"], bias.detach())


def layer_loss(trainer: GateTrainer, weight: Tensor, bias: Tensor, batch: ToyBatch, layer: int) -> Tensor:
    """Σ over gated projections of the weighted cross entropy."""
    scaled = batch.inputs[layer, "qkv"] / trainer.mean_squares["qkv"][layer].sqrt()
    logits = (scaled @ weight[layer].T + bias[layer]).view(len(scaled), 3, COLUMNS)
    losses = [
        torch.nn.functional.cross_entropy(logits[:, place], batch.labels_R, reduction="none") @ batch.weights_R
        for place, gated in enumerate(LINEARS[0].gated[layer])
        if gated
    ]
    return torch.stack(losses).sum()


def test_projections_without_gates_do_not_move_but_for_the_decay() -> None:
    options = TrainingOptions(steps=5, weight_decay=0.0)
    trainer = trained(fresh(options), 5)
    rows = slice(COLUMNS, 2 * COLUMNS)
    assert torch.equal(trainer.weights["qkv"][1, rows], fresh(options).weights["qkv"][1, rows])
    assert not torch.equal(trainer.weights["qkv"][0, rows], fresh(options).weights["qkv"][0, rows])


def test_a_resumed_training_ends_bit_for_bit_as_an_uninterrupted_one() -> None:
    whole = trained(fresh(), 20)
    buffer = io.BytesIO()
    torch.save(trained(fresh(), 8).state(), buffer)
    resumed = GateTrainer(LINEARS, COLUMNS, OPTIONS, CPU)
    resumed.load_state(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    assert resumed.num_steps == 8
    trained(resumed, 20)
    for fused in whole.weights:
        for one, other in zip(whole.served(fused), resumed.served(fused), strict=True):
            assert torch.equal(one, other)


def test_the_same_seed_gives_the_same_gates_and_another_others() -> None:
    first, same = trained(fresh(), 3), trained(fresh(), 3)
    other = fresh(TrainingOptions(seed=1))
    assert torch.equal(first.weights["down"], same.weights["down"])
    assert not torch.equal(fresh().weights["down"], other.weights["down"])
    assert fresh().weights["qkv"].std().item() == pytest.approx(OPTIONS.init_std, rel=0.2)


def test_the_learning_rate_warms_up_and_ends_at_zero() -> None:
    rates = [OPTIONS.learning_rate_at(step) for step in range(OPTIONS.steps + 1)]
    assert rates[: OPTIONS.warm_up] == sorted(rates[: OPTIONS.warm_up])
    assert max(rates) == OPTIONS.learning_rate == rates[OPTIONS.warm_up]
    assert rates[-1] == pytest.approx(0, abs=1e-9)


def test_mean_squares_are_those_of_the_inputs() -> None:
    batch = ToyFeatures().batch(0)
    found = mean_squares_of([batch], LINEARS, CPU)["down"]
    expected = (batch.weights_R[:, None] * batch.inputs[1, "down"].square()).sum(0)
    torch.testing.assert_close(found[1], expected)
    assert torch.equal(found[0], torch.zeros(INPUTS))

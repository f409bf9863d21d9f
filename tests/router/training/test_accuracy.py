"""What is counted: decisions by the largest logit, and the weight of the k kept columns."""

import pytest
import torch

from perseid_kernels.routing import route
from perseid_router.training.accuracy import DecisionMeter, as_report, kept_weights
from perseid_router.training.features import FusedGates, balanced_weights
from perseid_router.training.options import TrainingOptions
from perseid_router.training.trainer import GateTrainer

ONE_GATE = (FusedGates("o", ("o_proj",), 3, ((True,),)),)


def test_kept_weights_are_those_of_the_contracts_oracle() -> None:
    logits = torch.randn((20, 5), generator=torch.Generator().manual_seed(1), dtype=torch.float64).round(decimals=1)
    for k in (1, 2, 5, 9):
        for row, weights in zip(logits, kept_weights(logits, k, 0.7), strict=True):
            chosen, expected, _ = route(row, torch.ones(5), k, 0.7)
            assert weights.nonzero().flatten().tolist() == chosen
            torch.testing.assert_close(weights[chosen], expected)


def test_ties_go_to_the_lowest_column() -> None:
    assert kept_weights(torch.tensor([0.0, 2.0, 2.0, 2.0]), 2, 1.0).tolist() == [0.0, 0.5, 0.5, 0.0]


def test_decisions_are_counted_by_what_is_right_and_what_was_chosen() -> None:
    trainer = GateTrainer(ONE_GATE, 3, TrainingOptions(), torch.device("cpu"))
    trainer.weights["o"].copy_(10 * torch.eye(3)[None])  # chooses the largest input
    meter = DecisionMeter(trainer, 1, 1.0)
    meter.count(0, "o", torch.eye(3)[[0, 0, 0, 1, 2]], torch.tensor([0, 0, 1, 1, 2]))
    found = meter.decisions()
    assert found.confusion.tolist() == [[2, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert found.accuracy == pytest.approx((1 + 0.5 + 1) / 3)
    assert found.shares.tolist() == [[1, 0, 0], [0.5, 0.5, 0], [0, 0, 1]]
    report = as_report(found, ["a", "b", "base"])
    assert report["accuracy_per_projection_and_layer"] == {"o_proj": [pytest.approx(5 / 6)]}


def test_every_column_counts_the_same_however_many_tokens_it_has() -> None:
    labels = torch.tensor([0] * 6 + [1] * 2 + [3])  # none of column 2
    weights = balanced_weights(labels, 4)
    assert weights.sum().item() == pytest.approx(1)
    assert [weights[labels == column].sum().item() for column in (0, 1, 3)] == [pytest.approx(1 / 3)] * 3
    favoured = balanced_weights(labels, 4, null_weight=2.0)
    assert [favoured[labels == column].sum().item() for column in (0, 1, 3)] == pytest.approx([0.25, 0.25, 0.5])


def test_no_rows_are_no_decisions() -> None:
    meter = DecisionMeter(GateTrainer(ONE_GATE, 3, TrainingOptions(), torch.device("cpu")), 2, 1.0)
    meter.count(0, "o", torch.empty(0, 3), torch.empty(0, dtype=torch.int64))
    assert meter.decisions().confusion.sum() == 0

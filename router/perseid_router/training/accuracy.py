"""How well gates decide: confusion counts per layer and projection, and where the weight goes.

Shape legend: L layers, P projections, C columns, R rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perseid_router.training.features import FusedGates
from perseid_router.training.trainer import GateTrainer


def kept_weights(logits: Tensor, k: int, temperature: float) -> Tensor:
    """Softmax over the k largest logits of each row, zero elsewhere; ties go to the lowest column. [..., C]"""
    order = logits.argsort(dim=-1, descending=True, stable=True)[..., :k]
    kept = torch.softmax(logits.gather(-1, order) / temperature, dim=-1)
    return torch.zeros_like(logits).scatter(-1, order, kept)


@dataclass(frozen=True, slots=True)
class Decisions:
    """Sums over rows. Only gated projections count in what is averaged."""

    counts: Mapping[str, Tensor]  # fused → int64 [L, P, C right, C chosen], by the largest logit
    weight: Tensor  # float64 [C right, C]: Σ over gates and rows of the weights of the k kept
    linears: Mapping[str, FusedGates]

    @property
    def confusion(self) -> Tensor:
        """int64 [C right, C chosen], over all gates."""
        return torch.stack([self._gated(fused).sum(0) for fused in self.counts]).sum(0)

    @property
    def accuracy(self) -> float:
        """Share of decisions that are right, every column counting the same."""
        return _balanced(self.confusion)

    @property
    def shares(self) -> Tensor:
        """float64 [C right, C]: how the weight of a column's rows is spread; rows sum to 1."""
        return self.weight / self.weight.sum(1, keepdim=True).clamp_min(1e-12)

    def accuracy_of(self, fused: str, layer: int, projection: int) -> float | None:
        """Of one gate; None where there is none."""
        gated = self.linears[fused].gated[layer][projection]
        return _balanced(self.counts[fused][layer, projection]) if gated else None

    def _gated(self, fused: str) -> Tensor:
        return self.counts[fused][torch.tensor(self.linears[fused].gated)]


class DecisionMeter:
    """Counts decisions of a trainer's gates as inputs are shown."""

    def __init__(self, trainer: GateTrainer, k: int, temperature: float) -> None:
        self._trainer = trainer
        self._k, self._temperature = k, temperature
        columns = trainer.num_columns
        self._counts = {
            fused: torch.zeros((len(linear.gated), len(linear.projections), columns, columns), dtype=torch.int64)
            for fused, linear in trainer.linears.items()
        }
        self._weight = torch.zeros((columns, columns), dtype=torch.float64)

    def count(self, layer: int, fused: str, x_RK: Tensor, labels_R: Tensor) -> None:
        """Let the gates of one linear decide about these rows."""
        columns = self._trainer.num_columns
        logits = self._trainer.logits(layer, fused, x_RK)
        pairs_RP = labels_R[:, None] * columns + logits.argmax(-1)
        weights = kept_weights(logits, self._k, self._temperature)
        for projection, gated in enumerate(self._trainer.linears[fused].gated[layer]):
            counted = torch.bincount(pairs_RP[:, projection], minlength=columns * columns).view(columns, columns)
            self._counts[fused][layer, projection] += counted.cpu()
            if gated:
                self._weight.index_add_(0, labels_R.cpu(), weights[:, projection].double().cpu())

    def decisions(self) -> Decisions:
        """What was counted so far."""
        return Decisions(self._counts, self._weight, self._trainer.linears)


def as_report(decisions: Decisions, columns: Sequence[str]) -> dict[str, Any]:
    """For report.json: accuracy per layer and projection, the confusion matrix, the spread of the weight."""
    per_layer = {
        projection: [decisions.accuracy_of(fused, layer, place) for layer in range(len(linear.gated))]
        for fused, linear in decisions.linears.items()
        for place, projection in enumerate(linear.projections)
    }
    return {
        "accuracy": decisions.accuracy,
        "accuracy_per_projection_and_layer": per_layer,
        "columns": list(columns),
        "confusion": decisions.confusion.tolist(),
        "weight_shares": decisions.shares.tolist(),
    }


def _balanced(confusion: Tensor) -> float:
    counts = confusion.sum(1)
    recall = confusion.diagonal()[counts > 0] / counts[counts > 0]
    return float(recall.mean()) if recall.numel() else float("nan")

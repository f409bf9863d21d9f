"""What gates are trained on: rows of a decoder's pass, shown linear by linear as the pass goes on.

The inputs of one token are some hundred kilobytes, so nothing is kept: a gate takes its gradient when its input is
shown. Implemented by `perseid_server.training.features`.

Shape legend: R rows that teach, K inputs of a linear.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Observer = Callable[[int, str, Tensor], None]
"""Is shown (layer, fused linear, inputs [R, K])."""


class Batch(Protocol):
    """Some rows with known answers."""

    @property
    def labels_R(self) -> Tensor:  # noqa: N802  its suffix is its shape
        """int64: the column that is right for each row."""
        ...

    @property
    def weights_R(self) -> Tensor:  # noqa: N802
        """float32, Σ = 1: what each row counts."""
        ...

    def show(self, observe: Observer) -> None:
        """Run the pass; show every gated linear's inputs of the R rows once."""
        ...


class Features(Protocol):
    """Batches by number: the same number always means the same rows, so that training can be resumed."""

    def batch(self, step: int) -> Batch:
        """The rows of one step."""
        ...


@dataclass(frozen=True, slots=True)
class FusedGates:
    """The gates of one fused linear, alike in all layers that have them."""

    fused: str
    projections: tuple[str, ...]  # those that share the input, in the order of their outputs
    num_inputs: int  # K
    gated: tuple[tuple[bool, ...], ...]  # [layers][projections]: whether any adapter changes it


def balanced_weights(labels_R: Tensor, num_columns: int, null_weight: float = 1.0) -> Tensor:
    """float32 [R], Σ = 1: every column among the labels counts the same, the last (null) `null_weight` times that.

        w_r = s(label_r) / count(label_r) / Σ_c s(c)        c over the columns that occur

    Without this, an adapter with long answers would be the best guess for every doubtful token.
    """
    counts_C = torch.bincount(labels_R, minlength=num_columns).float()
    share_C = (counts_C > 0).float()
    share_C[-1] *= null_weight
    per_row_C = share_C / counts_C.clamp_min(1) / share_C.sum()
    return per_row_C[labels_R]

"""Toy features: two layers whose inputs hold their label in a direction of their own, on very unlike scales."""

from dataclasses import dataclass

import torch
from torch import Tensor

from perseid_router.training.features import FusedGates, Observer, balanced_weights

COLUMNS, INPUTS, ROWS = 4, 12, 64
LINEARS = (
    FusedGates("qkv", ("q_proj", "k_proj", "v_proj"), INPUTS, ((True, True, True), (True, False, True))),
    FusedGates("down", ("down_proj",), INPUTS, ((False,), (True,))),
)
SCALES = {"qkv": 1e-2, "down": 30.0}


@dataclass(frozen=True)
class ToyBatch:
    labels_R: Tensor
    weights_R: Tensor
    inputs: dict[tuple[int, str], Tensor]

    def show(self, observe: Observer) -> None:
        for (layer, fused), x_RK in self.inputs.items():
            observe(layer, fused, x_RK)


class ToyFeatures:
    """Batch n is a function of n."""

    def __init__(self, noise: float = 0.2) -> None:
        self._noise = noise

    def batch(self, step: int) -> ToyBatch:
        random = torch.Generator().manual_seed(step)
        labels = torch.randint(COLUMNS, (ROWS,), generator=random)
        inputs = {}
        for layer, fused in ((0, "qkv"), (1, "qkv"), (1, "down")):
            x = torch.randn((ROWS, INPUTS), generator=random) * self._noise
            x[torch.arange(ROWS), (labels + layer + len(fused)) % INPUTS] += 1
            inputs[layer, fused] = x * SCALES[fused] * torch.arange(1, INPUTS + 1)
        return ToyBatch(labels, balanced_weights(labels, COLUMNS), inputs)

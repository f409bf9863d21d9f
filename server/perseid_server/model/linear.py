"""The adapted linear: what every projection of the decoder is.

    y[t] = W₄ x[t] + bias + Σ_j w_j · B_jᵀ(A_j x[t])        j over the adapter pages of row t

One `AdaptedLinear` stands for all projections that share an input (q, k, v; gate, up): their outputs lie side by
side, the 4-bit product and the shrink are one call each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perseid_kernels.backend import Backend
from perseid_kernels.rank_pages import RankPages
from perseid_kernels.routing import Gates, RoutedRows
from perseid_kernels.segments import Segments
from perseid_kernels.weights import Weight, merge_outputs


@dataclass(frozen=True, slots=True)
class PackedPart:
    """A weight in the backend's layout, and the output columns it fills."""

    weight: Any
    columns: slice


@dataclass(frozen=True, slots=True)
class AdaptedLinear:
    """Packed weights of one fused linear, [N, K] in all. `slices` holds the widths of its projections, Σ = N."""

    backend: Backend
    parts: tuple[PackedPart, ...]
    slices: tuple[int, ...]
    bias_N: Tensor | None

    @staticmethod
    def build(
        backend: Backend, device: torch.device, weights: Sequence[Weight], biases: Sequence[Tensor | None]
    ) -> "AdaptedLinear":
        """Pack projections that share an input. Neighbours of one kind become one product."""
        parts = []
        start = 0
        for weight in merge_outputs(list(weights)):
            end = start + weight.shape[0]
            parts.append(PackedPart(backend.pack(weight, device), slice(start, end)))
            start = end
        slices = tuple(weight.shape[0] for weight in weights)
        return AdaptedLinear(backend, tuple(parts), slices, _join_biases(slices, biases, backend, device))

    @property
    def num_outputs(self) -> int:
        """N"""
        return sum(self.slices)

    @property
    def nbytes(self) -> int:
        """Device bytes of weights and bias."""
        bias = 0 if self.bias_N is None else self.bias_N.nbytes
        return int(bias + sum(part.weight.nbytes for part in self.parts))

    def __call__(
        self,
        x_TK: Tensor,
        pages: RankPages | None = None,
        segments: Segments | None = None,
        routed: Sequence[tuple[RoutedRows, Gates]] = (),
    ) -> Tensor:
        """y, [T, N]. The pages are read only when rows are given that use them: `segments`, or `routed` ones."""
        out_TN = x_TK.new_empty((x_TK.shape[0], self.num_outputs))
        if len(self.parts) == 1:
            self.backend.matmul(x_TK, self.parts[0].weight, out_TN)
        else:
            for part in self.parts:
                self.backend.matmul(x_TK, part.weight, out_TN[:, part.columns])
        if self.bias_N is not None:
            out_TN += self.bias_N
        if segments is not None and pages is not None:
            self.backend.add_lora(x_TK, pages, segments, out_TN)
        if pages is not None:
            for rows, gates in routed:
                self.backend.add_routed(x_TK, gates, pages, rows, out_TN)
        return out_TN


def _join_biases(
    slices: Sequence[int], biases: Sequence[Tensor | None], backend: Backend, device: torch.device
) -> Tensor | None:
    """Biases side by side, zeros where a projection has none; None when no projection has one."""
    if all(bias is None for bias in biases):
        return None
    parts = [torch.zeros(width) if bias is None else bias for width, bias in zip(slices, biases, strict=True)]
    return torch.cat(parts).to(device, backend.compute_dtype)

"""The rank pages of one fused linear: where the adapters' A and B lie on the device.

Shape legend: P pages, S fused projections (q, k, v; gate, up) of widths `slices`, K inputs, N = Σ slices outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perseid_kernels.segments import PAGE_RANK


@dataclass(frozen=True, slots=True)
class RankPages:
    """A page holds PAGE_RANK rows of A for each projection, and PAGE_RANK rows of B over all outputs.

    Row r of slice i of A meets row r of B's columns of slice i. Rows of a slice from `live` on are zero in A: a
    backend need not read them, so a rank that is no multiple of PAGE_RANK, or a projection that an adapter leaves
    alone, costs what it uses.
    """

    a: Tensor  # [P, PAGE_RANK · S, K]
    b: Tensor  # [P, PAGE_RANK, N]
    live: Tensor  # int32 [P, S]
    slices: tuple[int, ...]

    @staticmethod
    def of(a_PCK: Tensor, b_PRN: Tensor, slices: Sequence[int]) -> "RankPages":
        """Pages that are all in use."""
        live = torch.full((a_PCK.shape[0], len(slices)), PAGE_RANK, dtype=torch.int32, device=a_PCK.device)
        return RankPages(a_PCK, b_PRN, live, tuple(slices))

    @staticmethod
    def allocate(
        num_pages: int, num_inputs: int, slices: Sequence[int], device: torch.device, dtype: torch.dtype
    ) -> "RankPages":
        """Pages to be written before they are used; until then A and B hold anything. A CPU's memory is touched, and
        so really taken, only as pages are written."""
        return RankPages(
            torch.empty((num_pages, PAGE_RANK * len(slices), num_inputs), dtype=dtype, device=device),
            torch.empty((num_pages, PAGE_RANK, sum(slices)), dtype=dtype, device=device),
            torch.zeros((num_pages, len(slices)), dtype=torch.int32, device=device),
            tuple(slices),
        )

    @staticmethod
    def bytes_per_page(num_inputs: int, slices: Sequence[int], dtype: torch.dtype) -> int:
        """Device bytes of one page."""
        return PAGE_RANK * (len(slices) * num_inputs + sum(slices)) * dtype.itemsize + 4 * len(slices)

    def write(self, page: int, a_CK: Tensor, b_RN: Tensor) -> None:
        """Fill one page."""
        self.a[page].copy_(a_CK)
        self.b[page].copy_(b_RN)
        in_use = a_CK.view(len(self.slices), PAGE_RANK, -1).ne(0).any(dim=2)
        ranks = torch.arange(1, PAGE_RANK + 1, dtype=torch.int32, device=in_use.device)
        self.live[page].copy_((in_use * ranks).amax(dim=1))

    def clear(self, page: int) -> None:
        """Fill one page with zeros."""
        for tensor in (self.a, self.b, self.live):
            tensor[page].zero_()

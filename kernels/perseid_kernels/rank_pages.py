"""The rank pages of one fused linear: where the adapters' A and B lie on the device.

Shape legend: P pages, S fused projections (q, k, v; gate, up) of widths `slices`, K inputs, N = Σ slices outputs.
"""

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perseid_kernels.segments import PAGE_RANK


@dataclass(frozen=True, slots=True)
class RankPages:
    """A page holds PAGE_RANK rows of A for each projection, and PAGE_RANK rows of B over all outputs.

    Row r of slice i of A meets row r of B's columns of slice i. Rows of a slice from `live` on are zero in both: a
    backend need not read them, so a rank that is no multiple of PAGE_RANK, or a projection that an adapter leaves
    alone, costs what it uses, in time and, on a CPU, in memory too.
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
        """Pages of zeros. A CPU's memory is really taken only where something else is written."""
        return RankPages(
            _zeros((num_pages, PAGE_RANK * len(slices), num_inputs), device, dtype),
            _zeros((num_pages, PAGE_RANK, sum(slices)), device, dtype),
            torch.zeros((num_pages, len(slices)), dtype=torch.int32, device=device),
            tuple(slices),
        )

    @staticmethod
    def bytes_per_page(num_inputs: int, slices: Sequence[int], dtype: torch.dtype) -> int:
        """Device bytes of one page."""
        return PAGE_RANK * (len(slices) * num_inputs + sum(slices)) * dtype.itemsize + 4 * len(slices)

    def write(self, page: int, a_CK: Tensor, b_RN: Tensor) -> None:
        """Fill one page. A slice's rank is its last row of A that is not zero; B's rows beyond it do not count.

        All rows count as in use until it is done: where it fails half way, the next write clears what this one left.
        """
        in_use = a_CK.view(len(self.slices), PAGE_RANK, -1).ne(0).any(dim=2)
        ranks = (in_use * torch.arange(1, PAGE_RANK + 1, device=in_use.device)).amax(dim=1).tolist()
        were = self.live[page].tolist()
        self.live[page].fill_(PAGE_RANK)
        start = 0
        for index, (width, rank, before) in enumerate(zip(self.slices, ranks, were, strict=True)):
            first, end = index * PAGE_RANK, start + width
            self.a[page, first : first + rank].copy_(a_CK[first : first + rank])
            self.b[page, :rank, start:end].copy_(b_RN[:rank, start:end])
            if rank < before:
                self.a[page, first + rank : first + before].zero_()
                self.b[page, rank:before, start:end].zero_()
            start = end
        self.live[page].copy_(torch.tensor(ranks, dtype=torch.int32))

    def clear(self, page: int) -> None:
        """Fill one page with zeros."""
        nothing = torch.zeros((), dtype=self.a.dtype)
        self.write(page, nothing.expand(self.a.shape[1:]), nothing.expand(self.b.shape[1:]))


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """On a CPU, memory that the system hands out as zeros when it is first touched: torch would touch all of it."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8)[:num_bytes].view(dtype).view(shape)

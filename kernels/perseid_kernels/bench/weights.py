"""Random weights, in the canonical form or straight in the Triton layout on a device (an 8B model in seconds)."""

import torch
from torch import Tensor

from perseid_kernels._triton import cdiv
from perseid_kernels.matmul_q4 import PackedInt4
from perseid_kernels.matmul_q8 import PackedInt8
from perseid_kernels.rank_pages import RankPages
from perseid_kernels.routing import Gates
from perseid_kernels.segments import PAGE_RANK
from perseid_kernels.weights import Int4Weight

NF4 = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
       0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.723, 1.0)  # fmt: skip
"""Four digits of it: the speed does not depend on them."""


def random_int4(rng: torch.Generator, num_outputs: int, num_inputs: int, group: int, *, affine: bool) -> Int4Weight:
    """Affine: codes 0 … 15 with a float16 scale and offset for each group (Q4_1, GPTQ). Else NF4 with a scale.

    The values have mean 0 and a variance of about 1 / K, so that a product of normed rows has one of about 1.
    """
    groups = (num_outputs, num_inputs // group)
    spread = (0.5 + torch.rand(groups, generator=rng)) / num_inputs**0.5
    codes = torch.randint(0, 256, (num_outputs, num_inputs // 2), generator=rng, dtype=torch.uint8)
    if not affine:
        return Int4Weight(codes, torch.tensor(NF4), spread * 2, None, group)
    scale = (spread / 4.6).half().float()  # 4.6: the standard deviation of 0 … 15
    return Int4Weight(codes, torch.arange(16.0), scale, (scale * -7.5).half().float(), group)


def random_packed_int4(
    num_outputs: int, num_inputs: int, group: int, device: torch.device, *, affine: bool = True
) -> PackedInt4:
    """As `random_int4`, but made on the device in the Triton layout: random codes, one scale and offset for all.

    Raises ValueError for inputs that are no whole groups.
    """
    if num_inputs % group:
        raise ValueError(f"{num_inputs} inputs are no whole groups of {group}")
    chunk = 128 if num_inputs % 128 == 0 else 64
    codes = torch.empty(cdiv(num_inputs, chunk), num_outputs, chunk // 8, dtype=torch.int32, device=device)
    codes.view(torch.uint8).random_(0, 256)
    groups = (num_inputs // group, num_outputs)
    if not affine:
        scale = torch.full(groups, 2 / num_inputs**0.5, device=device)
        return PackedInt4(codes, torch.tensor(NF4, device=device), scale, None, group, num_inputs, zero=None)
    spread = 1 / (4.6 * num_inputs**0.5)
    pair = torch.tensor([spread, -7.5 * spread], dtype=torch.float16, device=device).view(torch.int32)
    codebook = torch.arange(16.0, device=device)
    return PackedInt4(codes, codebook, pair.expand(groups).contiguous(), None, group, num_inputs, zero=0)


def random_packed_int8(num_outputs: int, num_inputs: int, group: int, device: torch.device) -> PackedInt8:
    """Random codes, one scale."""
    chunk = 128 if num_inputs % 128 == 0 else 64
    codes = torch.empty(cdiv(num_inputs, chunk), num_outputs, chunk, dtype=torch.uint8, device=device).random_(0, 256)
    scale = torch.full((num_inputs // group, num_outputs), 1 / (74 * num_inputs**0.5), device=device)
    return PackedInt8(codes, scale, group, num_inputs)


def random_pages(
    num_pages: int, num_inputs: int, slices: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> RankPages:
    """Pages in use throughout."""

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).mul_(0.02).to(dtype)

    a = numbers(num_pages, PAGE_RANK * len(slices), num_inputs)
    return RankPages.of(a, numbers(num_pages, PAGE_RANK, sum(slices)), slices)


def random_gates(columns: int, num_inputs: int, slices: int, device: torch.device) -> Gates:
    """Gates of every projection, whose logits of a normed row have a variance of about 1."""
    weight = torch.randn(slices * columns, num_inputs, device=device).div_(num_inputs**0.5)
    return Gates(weight, torch.zeros(slices * columns, device=device), (True,) * slices)

"""What the products share: launch knobs, the split over K, and the reduction of its parts.

All of them compute outᵀ tiles: the weight stands on the left of `tl.dot` (BLOCK_N outputs), the rows of x on the
right (BLOCK_T rows). A weight is dequantised into the left operand; the size of the right side does not change
which instruction is used or in which order K is summed.

K is cut into `splits` parts, by the weight's shape alone. Each part is summed by itself and the parts are added in
order. With few rows every part is its own program (`parallel`: 64 outputs × 16 rows alone would leave most of a
GPU idle) and `reduce_splits` adds them; with many rows one program does all parts one after the other. Both add
the same numbers in the same order, so a row's product does not depend on how many rows share the batch. This is
also why there is no separate GEMV kernel for one row: it would sum in another order, and the 16-row tile reads
the same bytes of the weight.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from dataclasses import dataclass

import torch
from torch import Tensor

from perseid_kernels._triton import cdiv, tl, triton

_REDUCE_BLOCK = 256


@dataclass(frozen=True, slots=True)
class MatmulConfig:
    """Launch knobs of a product."""

    splits: int
    parallel: bool  # each split is a program of its own
    block_n: int
    block_t: int
    num_warps: int
    num_stages: int


def num_splits(num_outputs: int, num_inputs: int) -> int:
    """By the weight's shape alone: up to 8, while decode has ≤ 512 programs and each ≥ 256 inputs."""
    column_tiles, splits = cdiv(num_outputs, 64), 1
    while splits < 8 and column_tiles * splits * 2 <= 512 and num_inputs // (splits * 2) >= 256:
        splits *= 2
    return splits


def choose_config(num_outputs: int, num_inputs: int, num_rows: int) -> MatmulConfig:
    """Three variants: decode (≤ 16 rows; deep pipeline, its tiles are small), small batches (≤ 32) and prefill."""
    splits = num_splits(num_outputs, num_inputs)
    if num_rows <= 16:
        return MatmulConfig(splits, splits > 1, block_n=64, block_t=16, num_warps=4, num_stages=6)
    if num_rows <= 32:
        return MatmulConfig(splits, splits > 1, block_n=64, block_t=32, num_warps=4, num_stages=5)
    return MatmulConfig(splits, parallel=False, block_n=128, block_t=64, num_warps=8, num_stages=3)


@triton.jit
def store_tile(out, total_NT, n, t, split, N, T, stride_out, PARALLEL: tl.constexpr):
    """Write an outᵀ tile: to `out` [T, N] in its dtype, or as one part to the float32 buffer [splits, T, N]."""
    inside = (n < N)[:, None] & (t < T)[None, :]
    row = t.to(tl.int64)
    if PARALLEL:
        row += split.to(tl.int64) * T
        tl.store(out + row[None, :] * N + n[:, None], total_NT, mask=inside)
    else:
        tl.store(out + row[None, :] * stride_out + n[:, None], total_NT.to(out.dtype.element_ty), mask=inside)


@triton.jit
def reduce_splits_kernel(parts, out, T, N, stride_out, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out[t, n] = ((0 + part 0) + part 1) + …: the order in which a program with all splits adds them."""
    t = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + (split * T + t) * N + n, mask=n < N, other=0.0)
    tl.store(out + t * stride_out + n, total.to(out.dtype.element_ty), mask=n < N)


def grid_of(config: MatmulConfig, num_outputs: int, num_rows: int) -> tuple[int, int, int]:
    """(column tiles, row tiles, parallel splits)"""
    splits = config.splits if config.parallel else 1
    return cdiv(num_outputs, config.block_n), cdiv(num_rows, config.block_t), splits


def parts_or_out(config: MatmulConfig, out_TN: Tensor) -> Tensor:
    """Where the kernel writes: `out`, or a float32 buffer [splits, T, N] that `reduce_parts` sums into it."""
    if not config.parallel:
        return out_TN
    return torch.empty((config.splits, *out_TN.shape), dtype=torch.float32, device=out_TN.device)


def reduce_parts(config: MatmulConfig, parts: Tensor, out_TN: Tensor) -> None:
    """Finish a parallel launch; nothing to do for one that wrote `out` itself."""
    if not config.parallel:
        return
    num_rows, num_outputs = out_TN.shape
    reduce_splits_kernel[(cdiv(num_outputs, _REDUCE_BLOCK), num_rows)](
        parts,
        out_TN,
        num_rows,
        num_outputs,
        out_TN.stride(0),
        SPLITS=config.splits,
        BLOCK=_REDUCE_BLOCK,
        num_warps=2,
    )

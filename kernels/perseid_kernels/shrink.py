"""Shrink: rows of x times the A pages their segment uses, for all fused projections at once.

    for segment s, for page j of s, for row t of s:   z[t, j] = x[t] @ A[p_j]ᵀ           z[t, j] ∈ ℝ^C

x [T, K], A [P, C, K] with C = PAGE_RANK · slices, z float32. Accumulated in float32.

The product over K is cut into `splits` parts that are kept apart: `expand` adds them in a fixed order, so there is
no memset, no atomics, and the sum is the same in every run. The number of splits depends on K alone, never on how
many rows there are, and the 16 columns of a page stand on the left of `tl.dot`, so tiles of 16 and of 64 rows use
the same instruction: a row's z does not depend on its neighbours.

Programs share the work out among themselves: each takes every num_programs-th (item, slice, split), so a grid of a
fixed size does whatever a step holds. A slice that a page leaves alone (`live` = 0) is skipped, here and in the
expand: an adapter of two projections is not charged for seven.

CPU paths: `eager_backend.EagerBackend.add_lora` and `native/`.
Source: Punica's SGMV shrink (arXiv:2310.18547), with rank pages and a row-tile work list.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from dataclasses import dataclass

import torch
from torch import Tensor

from perseid_kernels._triton import cdiv, power_of_two, tl, triton
from perseid_kernels.devices import compiler_options, device_class
from perseid_kernels.rank_pages import RankPages
from perseid_kernels.row_tiles import SMALL_TILE_ROWS, RowTiles
from perseid_kernels.segments import PAGE_RANK, Segments

_MAX_PROGRAMS = 2048  # small programs: about as many as 132 multiprocessors hold at once


@dataclass(frozen=True, slots=True)
class ShrinkConfig:
    """Launch knobs of the shrink."""

    splits: int
    block_k: int
    num_warps: int
    num_stages: int


def choose_config(num_inputs: int, tile_rows: int) -> ShrinkConfig:
    """`splits` from K alone (see above): enough programs to fill a GPU when one adapter decodes one row."""
    splits = 1 if num_inputs < 1024 else 4 if num_inputs < 8192 else 8
    block_k = min(128, max(16, power_of_two(cdiv(num_inputs, splits))))
    return ShrinkConfig(splits, block_k, num_warps=2 if tile_rows == SMALL_TILE_ROWS else 4, num_stages=3)


def num_programs(work: int) -> int:
    """Programs of a launch that has room for `work` pieces: no more than a large GPU holds at once."""
    return max(1, min(work, _MAX_PROGRAMS))


@triton.jit
def page_times_rows(
    x,  # [T, K]
    a_rows,  # pointers to the rows of A, [RANK]
    row,  # int64 [TILE_ROWS]
    live,  # int1 [TILE_ROWS]: lanes that hold a row
    split,
    K,
    stride_x,
    split_k,
    RANK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One split of A · x as [RANK, TILE_ROWS], for rows whatever way they were found; 0 in lanes that are not live."""
    acc = tl.zeros((RANK, TILE_ROWS), dtype=tl.float32)
    for start in range(split * split_k, tl.minimum((split + 1) * split_k, K), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < K
        x_at = x + row[None, :] * stride_x + k[:, None]
        x_KT = tl.load(x_at, mask=inside[:, None] & live[None, :], other=0.0)
        a_CK = tl.load(a_rows[:, None] + k[None, :], mask=inside[None, :], other=0.0)
        acc = tl.dot(a_CK.to(x_KT.dtype), x_KT, acc, input_precision="ieee")
    return acc


@triton.jit
def shrink_kernel(
    x,  # [T, K]
    a,  # [P, C, K]
    in_use,  # int32 [P, SLICES]
    rows,  # int32 [R]
    pages,  # int32 [ΣJ]
    items,  # int32 [I, 3]
    counts,  # int32 [2]
    z,  # float32 [I, SPLITS, C, TILE_ROWS]
    K,
    stride_x,
    split_k,  # inputs in one split, a multiple of BLOCK_K
    SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    RANK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    lane = tl.arange(0, TILE_ROWS)
    rank = tl.arange(0, RANK)
    work = tl.load(counts + 1) * SLICES * SPLITS
    for piece in range(tl.program_id(0), work, tl.num_programs(0)):
        split = piece % SPLITS
        slice_index = piece // SPLITS % SLICES
        item = piece // (SPLITS * SLICES)
        page = tl.load(pages + tl.load(items + item * 3 + 2)).to(tl.int64)
        if tl.load(in_use + page * SLICES + slice_index) > 0:
            first = tl.load(items + item * 3)
            live = lane < tl.load(items + item * 3 + 1)
            row = tl.load(rows + first + lane, mask=live, other=0).to(tl.int64)
            column = slice_index * RANK + rank
            a_rows = a + (page * SLICES * RANK + column) * K
            acc = page_times_rows(x, a_rows, row, live, split, K, stride_x, split_k, RANK, TILE_ROWS, BLOCK_K)
            base = (tl.cast(item, tl.int64) * SPLITS + split) * SLICES * RANK
            tl.store(z + (base + column)[:, None] * TILE_ROWS + lane[None, :], acc)


def shrink(x_TK: Tensor, pages: RankPages, segments: Segments, tiles: RowTiles) -> Tensor:
    """The shrink in the work list's order: float32 [I, splits, C, tile_rows], to be read by `expand` only (slices
    that a page leaves alone are not written)."""
    num_inputs, columns = x_TK.shape[1], pages.a.shape[1]
    config = choose_config(num_inputs, tiles.tile_rows)
    slices = columns // PAGE_RANK
    shape = (tiles.num_items, config.splits, columns, tiles.tile_rows)
    z = torch.empty(shape, dtype=torch.float32, device=x_TK.device)
    shrink_kernel[(num_programs(tiles.num_items * slices * config.splits),)](
        x_TK,
        pages.a,
        pages.live,
        segments.rows,
        segments.pages,
        tiles.items,
        tiles.counts,
        z,
        num_inputs,
        x_TK.stride(0),
        cdiv(cdiv(num_inputs, config.splits), config.block_k) * config.block_k,
        SLICES=slices,
        SPLITS=config.splits,
        RANK=PAGE_RANK,
        TILE_ROWS=tiles.tile_rows,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **compiler_options(device_class(x_TK.device)),
    )
    return z


def shrink_oracle(x_TK: Tensor, a_PCK: Tensor, segments: Segments) -> Tensor:
    """z as float32 [R, J, C]: entry r belongs to row `segments.rows[r]`; pages a row does not have are zero."""
    z = torch.zeros(segments.rows.numel(), segments.max_pages, a_PCK.shape[1])
    for s in range(segments.indptr.numel() - 1):
        pages = segments.pages[segments.page_indptr[s] : segments.page_indptr[s + 1]].tolist()
        for r in range(int(segments.indptr[s]), int(segments.indptr[s + 1])):
            row = x_TK[int(segments.rows[r])].float()
            for j, page in enumerate(pages):
                z[r, j] = a_PCK[page].float() @ row
    return z

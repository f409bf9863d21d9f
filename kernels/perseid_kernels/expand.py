"""Expand: the shrunk rows times their B pages, weighted and added to the output, all projections in one launch.

    for segment s, for row t of s, for slice i:   y[t, slice i] += Σ_j w_j · z[t, j, slice i] @ B[p_j][:, slice i]

z float32 as `shrink` leaves it (splits apart; they are added here, in order), B [P, PAGE_RANK, N], y [T, N] read
and written once. w_j · z is formed in float32 and rounded once to B's dtype; sums are float32.

A piece of work is a row tile and a column tile; it loops over the tile's real pages in their order, so a row's result
depends on that row alone. No two pieces write the same element: rows belong to one segment. Programs share the pieces
out as in the shrink, and pages that leave a slice alone are skipped.

CPU paths: `eager_backend.EagerBackend.add_lora` and `native/`.
Source: Punica's SGMV expand (arXiv:2310.18547), with rank pages and a row-tile work list.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from perseid_kernels._triton import tl, triton
from perseid_kernels.devices import compiler_options, device_class
from perseid_kernels.rank_pages import RankPages
from perseid_kernels.row_tiles import SMALL_TILE_ROWS, RowTiles
from perseid_kernels.segments import PAGE_RANK, Segments
from perseid_kernels.shrink import num_programs


@dataclass(frozen=True, slots=True)
class ExpandConfig:
    """Launch knobs of the expand."""

    block_n: int
    num_warps: int
    num_stages: int


def choose_config(tile_rows: int) -> ExpandConfig:
    """Narrow tiles for decode, to have enough programs; wide ones for prefill, to read z less often."""
    if tile_rows == SMALL_TILE_ROWS:
        return ExpandConfig(block_n=64, num_warps=4, num_stages=2)
    return ExpandConfig(block_n=128, num_warps=8, num_stages=2)


@triton.jit
def expand_kernel(
    z,  # float32 [I, SPLITS, SLICES · RANK, TILE_ROWS]
    b,  # [P, RANK, N]
    in_use,  # int32 [P, SLICES]
    rows,  # int32 [R]
    pages,  # int32 [ΣJ]
    weights,  # float32 [ΣJ]
    tiles,  # int32 [W, 4]
    items,  # int32 [I, 3]
    counts,  # int32 [2]
    columns,  # int32 [column tiles, 3]: slice, first column, end of the slice
    y,  # [T, N], added to
    N,
    stride_y,
    column_tiles,
    SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    RANK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    lane = tl.arange(0, TILE_ROWS)
    rank = tl.arange(0, RANK)
    work = tl.load(counts) * column_tiles
    for piece in range(tl.program_id(0), work, tl.num_programs(0)):
        column_tile = piece % column_tiles
        row_tile = piece // column_tiles
        slice_index = tl.load(columns + column_tile * 3)
        n = tl.load(columns + column_tile * 3 + 1) + tl.arange(0, BLOCK_N)
        inside = n < tl.load(columns + column_tile * 3 + 2)
        first = tl.load(tiles + row_tile * 4)
        count = tl.load(tiles + row_tile * 4 + 1)
        first_item = tl.load(tiles + row_tile * 4 + 2)
        end_item = tl.load(tiles + row_tile * 4 + 3)

        z_tile = (slice_index * RANK + rank)[:, None] * TILE_ROWS + lane[None, :]
        acc = tl.zeros((BLOCK_N, TILE_ROWS), dtype=tl.float32)
        used = 0
        for item in range(first_item, end_item):
            j = tl.load(items + item * 3 + 2)
            page = tl.load(pages + j).to(tl.int64)
            uses = tl.load(in_use + page * SLICES + slice_index) > 0  # a mask, not a branch: the loop is pipelined
            z_item = z + tl.cast(item, tl.int64) * SPLITS * SLICES * RANK * TILE_ROWS
            z_RT = tl.zeros((RANK, TILE_ROWS), dtype=tl.float32)
            for split in tl.static_range(SPLITS):
                z_RT += tl.load(z_item + split * SLICES * RANK * TILE_ROWS + z_tile, mask=uses, other=0.0)
            z_RT = z_RT * tl.load(weights + j)
            b_at = b + (page * RANK + rank)[None, :] * N + n[:, None]
            b_NR = tl.load(b_at, mask=inside[:, None] & uses, other=0.0)
            acc = tl.dot(b_NR, z_RT.to(b_NR.dtype), acc, input_precision="ieee")
            used += uses.to(tl.int32)

        if used > 0:
            live = lane < count
            row = tl.load(rows + first + lane, mask=live, other=0).to(tl.int64)
            y_tile = y + row[None, :] * stride_y + n[:, None]
            mask = inside[:, None] & live[None, :]
            before = tl.load(y_tile, mask=mask, other=0.0).to(tl.float32)
            tl.store(y_tile, (before + acc).to(y.dtype.element_ty), mask=mask)


def expand(z: Tensor, pages: RankPages, segments: Segments, tiles: RowTiles, out_TN: Tensor) -> None:
    """Add the low-rank sums of all rows in `tiles` to `out`, in place. `z` comes from `shrink`."""
    config = choose_config(tiles.tile_rows)
    columns = column_tiles(pages.slices, config.block_n, out_TN.device)
    expand_kernel[(num_programs(tiles.num_tiles * columns.shape[0]),)](
        z,
        pages.b,
        pages.live,
        segments.rows,
        segments.pages,
        segments.weights,
        tiles.tiles,
        tiles.items,
        tiles.counts,
        columns,
        out_TN,
        pages.b.shape[2],
        out_TN.stride(0),
        columns.shape[0],
        SLICES=len(pages.slices),
        SPLITS=z.shape[1],
        RANK=PAGE_RANK,
        TILE_ROWS=tiles.tile_rows,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **compiler_options(device_class(out_TN.device)),
    )


@lru_cache(maxsize=256)
def column_tiles(slices: tuple[int, ...], block_n: int, device: torch.device) -> Tensor:
    """Column tiles that never cross a slice; one small upload per shape of linear in a process's life."""
    tiles: list[tuple[int, int, int]] = []
    start = 0
    for index, width in enumerate(slices):
        tiles.extend((index, column, start + width) for column in range(start, start + width, block_n))
        start += width
    return torch.tensor(tiles, dtype=torch.int32, device=device).view(-1, 3)


def expand_oracle(z_RJC: Tensor, b_PRN: Tensor, slices: Sequence[int], segments: Segments, y_TN: Tensor) -> Tensor:
    """y + the low-rank sums in float32, from `shrink_oracle`'s z: a new tensor."""
    y = y_TN.float().clone()
    for s in range(segments.indptr.numel() - 1):
        first_page, end_page = int(segments.page_indptr[s]), int(segments.page_indptr[s + 1])
        for r in range(int(segments.indptr[s]), int(segments.indptr[s + 1])):
            start = 0
            for i, width in enumerate(slices):
                for j in range(first_page, end_page):
                    b = b_PRN[int(segments.pages[j]), :, start : start + width].float()
                    z = z_RJC[r, j - first_page, i * b.shape[0] : (i + 1) * b.shape[0]]
                    y[int(segments.rows[r]), start : start + width] += segments.weights[j] * (z @ b)
                start += width
    return y

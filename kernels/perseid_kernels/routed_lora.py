"""Low-rank sums of routed rows: each row's adapters come from its gates' choice, on the device.

    for routed row r, projection s:   y[r, s] += Σ_{c ∈ I, ascending} w_c · Σ_{j ∈ pages of c} (x[r] @ A[p_j]ᵀ) @ B[p_j]

I and w are `gate.Choice`. x [T, K], A [P, RANK · S, K], B [P, RANK, N], y [T, N] read and written once; z = x Aᵀ is
float32, w · z is formed in float32 and rounded once to B's dtype, sums are float32.

Nothing is read back: grids follow from R, S, C, max_k and max_pages. The shrink's programs look at tiles of rows, and
what a tile chose is done once for all its rows that chose it: a page of A is read once a tile. A decode step has fewer
rows than the gate set has columns, or more: its programs go over the places of the tile's rows, or over the columns,
whichever are fewer; in the first case the first row that chose a column does it. The expand goes over the distinct
columns of a tile in ascending order; its tiles hold one row in a decode step, to have enough programs, and where rows
choose many columns.

A row's numbers do not depend on its neighbours: sums over K, over pages and over columns have one order and one
matrix instruction, which are those of `shrink` and `expand`, and a lane takes up only what its row chose. So one
column of weight 1 gives the bits of the same adapter asked for by name.

CPU paths: `eager_backend.EagerBackend.add_routed` and `native/`. Oracle: `routing.add_routed_oracle`.
Source: MeteoRA (arXiv:2405.13053), with rank pages and z computed once instead of for every output tile.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from dataclasses import dataclass

import torch
from torch import Tensor

from perseid_kernels import expand, shrink
from perseid_kernels._triton import cdiv, power_of_two, tl, triton
from perseid_kernels.devices import compiler_options, device_class
from perseid_kernels.gate import Choice
from perseid_kernels.rank_pages import RankPages
from perseid_kernels.routing import RoutedRows
from perseid_kernels.row_tiles import LARGE_TILE_ROWS, SMALL_TILE_ROWS
from perseid_kernels.segments import PAGE_RANK

_ALONE = 64  # routed rows up to which each has expand programs of its own
_MAX_PICKS = 2048  # (row, place) pairs that a large tile may keep in registers


@dataclass(frozen=True, slots=True)
class RoutedConfig:
    """Launch knobs of both kernels; their own are those of `shrink` and `expand`."""

    shrink_rows: int  # rows of a shrink tile
    shrink: shrink.ShrinkConfig
    expand_rows: int  # rows that an expand tile takes
    expand_lanes: int  # and has room for
    expand: expand.ExpandConfig


def choose_config(num_rows: int, num_inputs: int, max_k: int) -> RoutedConfig:
    """Small tiles for decode and wherever rows choose many columns, large ones for prefill."""
    large = LARGE_TILE_ROWS * power_of_two(max_k) <= _MAX_PICKS
    rows = LARGE_TILE_ROWS if large and num_rows > 2 * SMALL_TILE_ROWS else SMALL_TILE_ROWS
    together = large and num_rows > _ALONE
    lanes = LARGE_TILE_ROWS if together else SMALL_TILE_ROWS
    return RoutedConfig(
        shrink_rows=rows,
        shrink=shrink.choose_config(num_inputs, rows),
        expand_rows=lanes if together else 1,
        expand_lanes=lanes,
        expand=expand.choose_config(lanes),
    )


@triton.jit
def picks_of(chosen, r, live, slice_index, max_k, SLICES: tl.constexpr, PLACES: tl.constexpr):
    """(what the rows chose, int32 [rows, PLACES] with −1 where nothing; place numbers, [1, PLACES])."""
    place = tl.arange(0, PLACES)[None, :]
    at = chosen + ((r * SLICES + slice_index) * max_k)[:, None] + place
    return tl.load(at, mask=live[:, None] & (place < max_k), other=-1), place


@triton.jit
def next_column(picks, after, C):
    """The lowest column above `after` that any of the rows chose; C when there is none."""
    return tl.min(tl.min(tl.where(picks > after, picks, C), axis=1), axis=0)


@triton.jit
def routed_shrink_kernel(
    x,  # [T, K]
    a,  # [P, SLICES · RANK, K]
    in_use,  # int32 [P, SLICES]
    rows,  # int32 [R]
    chosen,  # int32 [R, SLICES, max_k]
    pages,  # int32 [ΣJ]
    page_indptr,  # int32 [C + 1]
    z,  # float32 [R, SLICES, max_k, max_pages, SPLITS, RANK]
    R,
    K,
    stride_x,
    split_k,  # inputs in one split, a multiple of BLOCK_K
    max_k,
    max_pages,
    entries,  # of a row tile: C, or places of its rows
    work,
    BY_COLUMN: tl.constexpr,  # whether entry e is column e, or what place e of the tile holds
    SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    RANK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    lane = tl.arange(0, TILE_ROWS)
    rank = tl.arange(0, RANK)
    for piece in range(tl.program_id(0), work, tl.num_programs(0)):
        split = piece % SPLITS
        slice_index = piece // SPLITS % SLICES
        j = piece // (SPLITS * SLICES) % max_pages
        rest = piece // (SPLITS * SLICES) // max_pages
        entry = rest % entries
        r = (rest // entries * TILE_ROWS + lane).to(tl.int64)
        picks, place = picks_of(chosen, r, r < R, slice_index, max_k, SLICES, PLACES)
        column = entry
        if not BY_COLUMN:
            mine = (lane[:, None] == entry // max_k) & (place == entry % max_k)
            column = tl.max(tl.max(tl.where(mine, picks, -1), axis=1), axis=0)
        at = tl.max(tl.where(picks == column, place, -1), axis=1)
        first_lane = tl.min(tl.where(at >= 0, lane, TILE_ROWS), axis=0)
        mine_to_do = (column >= 0) & (first_lane < TILE_ROWS)
        if not BY_COLUMN:
            mine_to_do = (column >= 0) & (first_lane == entry // max_k)
        if mine_to_do:
            first_page = tl.load(page_indptr + column)
            if j < tl.load(page_indptr + column + 1) - first_page:
                page = tl.load(pages + first_page + j).to(tl.int64)
                if tl.load(in_use + page * SLICES + slice_index) > 0:
                    chose = at >= 0
                    row = tl.load(rows + r, mask=chose, other=0).to(tl.int64)
                    a_rows = a + (page * SLICES * RANK + slice_index * RANK + rank) * K
                    acc = shrink.page_times_rows(
                        x, a_rows, row, chose, split, K, stride_x, split_k, RANK, TILE_ROWS, BLOCK_K
                    )
                    of_row = (((r * SLICES + slice_index) * max_k + at) * max_pages + j) * SPLITS + split
                    tl.store(z + of_row[None, :] * RANK + rank[:, None], acc, mask=chose[None, :])


@triton.jit
def routed_expand_kernel(
    z,  # float32 [R, SLICES, max_k, max_pages, SPLITS, RANK]
    b,  # [P, RANK, N]
    in_use,  # int32 [P, SLICES]
    rows,  # int32 [R]
    chosen,  # int32 [R, SLICES, max_k]
    weights,  # float32 [R, SLICES, max_k]
    pages,  # int32 [ΣJ]
    page_indptr,  # int32 [C + 1]
    columns,  # int32 [column tiles, 3]: slice, first output, end of the slice
    y,  # [T, N], added to
    R,
    C,
    N,
    stride_y,
    max_k,
    max_pages,
    column_tiles,
    work,
    SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,  # of a tile: TILE_ROWS, or one, of which all lanes hold the same and the first one is written
    TILE_ROWS: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    lane = tl.arange(0, TILE_ROWS)
    rank = tl.arange(0, RANK)
    for piece in range(tl.program_id(0), work, tl.num_programs(0)):
        column_tile = piece % column_tiles
        slice_index = tl.load(columns + column_tile * 3)
        n = tl.load(columns + column_tile * 3 + 1) + tl.arange(0, BLOCK_N)
        inside = n < tl.load(columns + column_tile * 3 + 2)
        r = (piece // column_tiles * ROWS).to(tl.int64) + tl.arange(0, ROWS)
        picks, place = picks_of(chosen, r, r < R, slice_index, max_k, SLICES, PLACES)
        column = next_column(picks, -1, C)

        acc = tl.zeros((BLOCK_N, TILE_ROWS), dtype=tl.float32)
        touched = tl.zeros((ROWS,), dtype=tl.int32)
        used = 0
        # what depends on rows has ROWS lanes up to tl.dot: with TILE_ROWS of them a lone row's registers spill on sm_80
        while column < C:
            at = tl.max(tl.where(picks == column, place, -1), axis=1)
            chose = at >= 0
            of_row = (r * SLICES + slice_index) * max_k + at
            w = tl.load(weights + of_row, mask=chose, other=0.0)
            first_page = tl.load(page_indptr + column)
            for j in range(tl.load(page_indptr + column + 1) - first_page):
                page = tl.load(pages + first_page + j).to(tl.int64)
                uses = tl.load(in_use + page * SLICES + slice_index) > 0
                z_tile = z + ((of_row * max_pages + j) * SPLITS * RANK)[None, :] + rank[:, None]
                z_RT = tl.zeros((RANK, ROWS), dtype=tl.float32)
                for split in tl.static_range(SPLITS):
                    z_RT += tl.load(z_tile + split * RANK, mask=chose[None, :] & uses, other=0.0)
                b_at = b + (page * RANK + rank)[None, :] * N + n[:, None]
                b_NR = tl.load(b_at, mask=inside[:, None] & uses, other=0.0)
                z_RT = tl.broadcast_to((z_RT * w[None, :]).to(b_NR.dtype), (RANK, TILE_ROWS))
                # chosen by lane, and not left to zeros in z: a neighbour's page may hold inf
                acc = tl.where(chose[None, :], tl.dot(b_NR, z_RT, acc, input_precision="ieee"), acc)
                touched = touched | (chose & uses).to(tl.int32)
                used += uses.to(tl.int32)
            column = next_column(picks, column, C)

        if used > 0:
            row = tl.load(rows + r, mask=touched > 0, other=0).to(tl.int64)
            y_tile = y + tl.broadcast_to(row * stride_y, (TILE_ROWS,))[None, :] + n[:, None]
            mask = inside[:, None] & ((touched > 0) & (lane < ROWS))[None, :]
            before = tl.load(y_tile, mask=mask, other=0.0).to(tl.float32)
            tl.store(y_tile, (before + acc).to(y.dtype.element_ty), mask=mask)


def add_chosen(x_TK: Tensor, pages: RankPages, routed: RoutedRows, choice: Choice, out_TN: Tensor) -> None:
    """Add the products of the chosen columns to `out`, in place."""
    num_rows, slices, max_k = choice.columns.shape
    config = choose_config(num_rows, x_TK.shape[1], max_k)
    shape = (num_rows, slices, max_k, routed.max_pages, config.shrink.splits, PAGE_RANK)
    z = torch.empty(shape, dtype=torch.float32, device=x_TK.device)
    _shrink(x_TK, pages, routed, choice, config, z)
    _expand(z, pages, routed, choice, config, out_TN)


def _shrink(
    x_TK: Tensor, pages: RankPages, routed: RoutedRows, choice: Choice, config: RoutedConfig, z: Tensor
) -> None:
    num_rows, slices, max_k, max_pages, splits, _ = z.shape
    num_inputs, columns, knobs = x_TK.shape[1], routed.table.num_columns, config.shrink
    places = min(num_rows, config.shrink_rows) * max_k
    entries = min(columns, places)
    work = cdiv(num_rows, config.shrink_rows) * entries * max_pages * slices * splits
    routed_shrink_kernel[(shrink.num_programs(work),)](
        x_TK,
        pages.a,
        pages.live,
        routed.rows,
        choice.columns,
        routed.pages,
        routed.page_indptr,
        z,
        num_rows,
        num_inputs,
        x_TK.stride(0),
        cdiv(cdiv(num_inputs, splits), knobs.block_k) * knobs.block_k,
        max_k,
        max_pages,
        entries,
        work,
        BY_COLUMN=columns <= places,
        SLICES=slices,
        SPLITS=splits,
        RANK=PAGE_RANK,
        TILE_ROWS=config.shrink_rows,
        PLACES=power_of_two(max_k),
        BLOCK_K=knobs.block_k,
        num_warps=knobs.num_warps,
        num_stages=knobs.num_stages,
        **compiler_options(device_class(x_TK.device)),
    )


def _expand(
    z: Tensor, pages: RankPages, routed: RoutedRows, choice: Choice, config: RoutedConfig, out_TN: Tensor
) -> None:
    num_rows, slices, max_k, max_pages, splits, _ = z.shape
    knobs = config.expand
    columns = expand.column_tiles(pages.slices, knobs.block_n, out_TN.device)
    work = cdiv(num_rows, config.expand_rows) * columns.shape[0]
    routed_expand_kernel[(shrink.num_programs(work),)](
        z,
        pages.b,
        pages.live,
        routed.rows,
        choice.columns,
        choice.weights,
        routed.pages,
        routed.page_indptr,
        columns,
        out_TN,
        num_rows,
        routed.table.num_columns,
        pages.b.shape[2],
        out_TN.stride(0),
        max_k,
        max_pages,
        columns.shape[0],
        work,
        SLICES=slices,
        SPLITS=splits,
        RANK=PAGE_RANK,
        ROWS=config.expand_rows,
        TILE_ROWS=config.expand_lanes,
        PLACES=power_of_two(max_k),
        BLOCK_N=knobs.block_n,
        num_warps=knobs.num_warps,
        num_stages=knobs.num_stages,
        **compiler_options(device_class(out_TN.device)),
    )

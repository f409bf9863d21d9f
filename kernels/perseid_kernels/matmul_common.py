"""What the products share: launch knobs, the split over K, and the reduction of its parts.

All of them compute outᵀ tiles: the weight stands on the left of `tl.dot` (BLOCK_N outputs), the rows of x on the
right (BLOCK_T rows). A weight is dequantised into the left operand; the size of the right side does not change
which instruction is used or in which order K is summed, and a longer BLOCK_K only takes more of the same
instructions at a time.

K is cut into `splits` parts, by the weight's shape alone. Each part is summed by itself and the parts are added in
order. Where the tiles alone would leave most of a GPU idle every part is its own program (`parallel`) and
`reduce_splits` adds them; else one program does all parts one after the other. Both add the same numbers in the
same order, so a row's product does not depend on how many rows share the batch. This is also why there is no
separate GEMV kernel for one row: it would sum in another order, and the 16-row tile reads the same bytes of the
weight.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from perseid_kernels._triton import cdiv, tl, triton
from perseid_kernels.devices import compiler_options

_REDUCE_BLOCK = 256
_FULL = 0.9  # where the tiles alone occupy less of the device than this, splits run in parallel
_MAX_PARTS_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Tile:
    """Block sizes and launch knobs of a product."""

    block_n: int
    block_t: int
    block_k: int  # at most; a weight's own chunk may be shorter
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class DeviceTiles:
    """The tiles of one kind of device, by row class."""

    processors: int  # multiprocessors (compute units) of a typical device
    by_rows: Mapping[int, Tile]  # most rows of a class → tile, ascending
    many: Tile  # more rows than that
    many_serial: Tile  # the same where one program adds several splits: it holds two accumulators


# sm_80 and its small siblings have 99 KiB of shared memory a block, gfx942 64 KiB, sm_90 227 KiB.
TILES: Mapping[str, DeviceTiles] = {
    "sm_80": DeviceTiles(
        processors=108,
        by_rows={
            16: Tile(64, 16, 128, 4, 5),
            32: Tile(64, 32, 128, 4, 4),
            64: Tile(64, 64, 64, 4, 3),
            128: Tile(128, 64, 64, 8, 3),
        },
        many=Tile(128, 128, 64, 8, 3),
        many_serial=Tile(128, 64, 64, 8, 3),
    ),
    "sm_90": DeviceTiles(
        processors=132,
        by_rows={
            16: Tile(64, 16, 128, 4, 5),
            32: Tile(64, 32, 128, 4, 4),
            64: Tile(64, 64, 128, 4, 4),
            128: Tile(128, 128, 64, 8, 4),
        },
        many=Tile(128, 256, 64, 8, 4),
        many_serial=Tile(128, 128, 64, 8, 4),
    ),
    "gfx942": DeviceTiles(
        processors=304,
        by_rows={
            16: Tile(64, 16, 128, 4, 2),
            32: Tile(64, 32, 128, 4, 2),
            64: Tile(64, 64, 64, 4, 2),
            128: Tile(128, 64, 64, 8, 2),
        },
        many=Tile(128, 128, 64, 8, 2),
        many_serial=Tile(128, 64, 64, 8, 2),
    ),
}
"""Chosen by what the compiler reports (registers, spills, shared memory, instructions); not tuned on a device."""


@dataclass(frozen=True, slots=True)
class MatmulConfig:
    """How one product is launched."""

    splits: int
    parallel: bool  # each split is a program of its own
    tile: Tile
    kind: str  # of device

    def constants(self) -> dict[str, Any]:
        """The tile's compile-time constants, without BLOCK_K (a weight's layout may shorten it)."""
        return {
            "SPLITS": self.splits,
            "PARALLEL": self.parallel,
            "BLOCK_N": self.tile.block_n,
            "BLOCK_T": self.tile.block_t,
        }

    def launch(self) -> dict[str, Any]:
        """Options of the launch."""
        return {"num_warps": self.tile.num_warps, "num_stages": self.tile.num_stages, **compiler_options(self.kind)}


def num_splits(num_outputs: int, num_inputs: int) -> int:
    """By the weight's shape alone: up to 8, while decode has ≤ 384 programs and each ≥ 256 inputs.

    256 programs and more keep a large GPU's memory busy; each further split costs float32 parts to write and read,
    which at 256 rows are as many bytes as the weight.
    """
    column_tiles, splits = cdiv(num_outputs, 64), 1
    while splits < 8 and column_tiles * splits * 2 <= 384 and num_inputs // (splits * 2) >= 256:
        splits *= 2
    return splits


def inputs_of_split(num_outputs: int, num_inputs: int, chunk: int) -> int:
    """Inputs of every split but the last: whole chunks, by the weight's shape alone."""
    return cdiv(cdiv(num_inputs, num_splits(num_outputs, num_inputs)), chunk) * chunk


@lru_cache(maxsize=4096)
def choose_config(num_outputs: int, num_inputs: int, num_rows: int, kind: str = "sm_80") -> MatmulConfig:
    """The smallest row class that holds the rows; its splits run in parallel when the tiles alone are too few."""
    device = TILES[kind]
    splits = num_splits(num_outputs, num_inputs)
    tile = next((tile for limit, tile in device.by_rows.items() if num_rows <= limit), device.many)
    serial = device.many_serial
    programs = cdiv(num_outputs, serial.block_n) * cdiv(num_rows, serial.block_t)
    held = splits * num_rows * num_outputs * 4
    parallel = splits > 1 and programs < _FULL * device.processors and held <= _MAX_PARTS_BYTES
    if splits > 1 and not parallel:
        tile = serial
    return MatmulConfig(splits, parallel, tile, kind)


@triton.jit
def per_word(groups_NG, WORDS: tl.constexpr):
    """[BLOCK_N, SCALES] → [BLOCK_N, WORDS]: each group's value for every word in it ([BLOCK_N, 1] as it is)."""
    BLOCK_N: tl.constexpr = groups_NG.shape[0]
    SCALES: tl.constexpr = groups_NG.shape[1]
    if SCALES == 1:
        return groups_NG
    else:  # noqa: RET505  (Triton compiles both sides of a branch that follows a return)
        return groups_NG[:, :, None].broadcast_to(BLOCK_N, SCALES, WORDS // SCALES).reshape(BLOCK_N, WORDS)


@triton.jit
def store_tile(out, total_NT, n, first_t, split, N, T, stride_out, PARALLEL: tl.constexpr):
    """Write an outᵀ tile whose first row is `first_t`: to `out` [T, N] in its dtype, or as one part to the float32
    buffer [splits, T, N]. Addresses are a 64-bit base and 32-bit distances, which saves registers."""
    lane = tl.arange(0, total_NT.shape[1])
    inside = (n < N)[:, None] & (first_t + lane < T)[None, :]
    row = first_t.to(tl.int64)
    if PARALLEL:
        base = out + (tl.cast(split, tl.int64) * T + row) * N
        tl.store(base + (lane[None, :] * N + n[:, None]), total_NT, mask=inside)
    else:
        base = out + row * stride_out
        tl.store(base + (lane[None, :] * stride_out + n[:, None]), total_NT.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def reduce_splits_kernel(parts, out, T, N, stride_out, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out[t, n] = (part 0 + part 1) + …: the order in which a program with all splits adds them."""
    t = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(parts + t * N + n, mask=n < N, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts + (split * T + t) * N + n, mask=n < N, other=0.0)
    tl.store(out + t * stride_out + n, total.to(out.dtype.element_ty), mask=n < N)


def grid_of(config: MatmulConfig, num_outputs: int, num_rows: int) -> tuple[int, int, int]:
    """(row tiles, column tiles, parallel splits): programs that read the same weights run side by side."""
    splits = config.splits if config.parallel else 1
    return cdiv(num_rows, config.tile.block_t), cdiv(num_outputs, config.tile.block_n), splits


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
    reduce_splits_kernel[(num_rows, cdiv(num_outputs, _REDUCE_BLOCK))](
        parts,
        out_TN,
        num_rows,
        num_outputs,
        out_TN.stride(0),
        SPLITS=config.splits,
        BLOCK=_REDUCE_BLOCK,
        num_warps=2,
    )

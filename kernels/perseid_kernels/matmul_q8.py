"""The 8-bit product, for embeddings and output heads (GGUF Q8_0 and Q6_K).

    out[t, o] = Σ_i x[t, i] · W[o, i]        W[o, i] = q[o, i] · scale[o, i // group_size]

x [T, K] and out [T, N] in the compute dtype, scale float32; W is formed in float32, rounded once to the compute
dtype, and summed in float32.

Layout: inputs in blocks of 32 (16 where the group is), blocks outermost: codes uint8 [blocks, N, BLOCK] = q + 128,
scale [G, N]. A tile's bytes are one contiguous run and lie within one group. K is padded to whole blocks.

CPU paths: `eager_backend.EagerBackend.matmul` and `native/`. Oracle: `matmul_q8_oracle`.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from dataclasses import dataclass

import torch
from torch import Tensor

from perseid_kernels._triton import cdiv, tl, triton
from perseid_kernels.matmul_common import choose_config, grid_of, parts_or_out, reduce_parts, store_tile
from perseid_kernels.weights import Int8Weight

_MAGIC = tl.constexpr(0x4B000000)  # float32 2²³: its low mantissa bits count in ones
_MAGIC_BIAS = tl.constexpr(float((1 << 23) + 128))


@dataclass(frozen=True, slots=True)
class PackedInt8:
    """An Int8Weight in the layout above, on the device."""

    codes: Tensor  # uint8 [blocks, N, BLOCK]
    scale: Tensor  # float32 [G, N]
    group_size: int
    num_inputs: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)"""
        return self.codes.shape[1], self.num_inputs

    @property
    def block(self) -> int:
        """Inputs in one block."""
        return self.codes.shape[2]

    @property
    def nbytes(self) -> int:
        """Device bytes held."""
        return self.codes.nbytes + self.scale.nbytes


def pack_int8(weight: Int8Weight, device: torch.device) -> PackedInt8:
    """Lay a canonical weight out for the kernel. Raises ValueError for a group size the kernel cannot cut."""
    num_outputs, num_inputs = weight.shape
    block = 32 if weight.group_size % 32 == 0 else 16
    if weight.group_size % block:
        raise ValueError(
            f"group_size {weight.group_size}: the Triton 8-bit product needs a multiple of 16 (tl.dot's least K)"
        )
    blocks = cdiv(num_inputs, block)
    plain = torch.full((num_outputs, blocks * block), 128, dtype=torch.uint8)
    plain[:, :num_inputs] = (weight.codes.cpu().to(torch.int16) + 128).to(torch.uint8)
    return PackedInt8(
        codes=plain.view(num_outputs, blocks, block).transpose(0, 1).contiguous().to(device),
        scale=weight.scale.t().contiguous().to(device),
        group_size=weight.group_size,
        num_inputs=num_inputs,
    )


@triton.jit
def matmul_q8_kernel(
    x,  # [T, K]
    codes,  # uint8 [blocks, N, BLOCK_K]
    scale,  # float32 [G, N]
    out,  # [T, N], or float32 [SPLITS, T, N] where PARALLEL
    T,
    N,
    K,
    stride_x,
    stride_out,
    blocks,
    GROUP_SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,  # K fills its blocks
    SPLITS: tl.constexpr,
    PARALLEL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    j = tl.arange(0, BLOCK_K)
    live_n = n < N
    live_t = (t < T)[None, :]
    x_rows = x + t.to(tl.int64)[None, :] * stride_x

    blocks_in_split = tl.cdiv(blocks, SPLITS)
    first_split = tl.program_id(2)
    last_split = first_split + 1 if PARALLEL else SPLITS
    total = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
    for split in range(first_split, last_split):
        acc = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
        for block in range(split * blocks_in_split, tl.minimum((split + 1) * blocks_in_split, blocks)):
            k = block * BLOCK_K + j
            mask = live_t if EVEN_K else live_t & (k < K)[:, None]
            x_KT = tl.load(x_rows + k[:, None], mask=mask, other=0.0)
            byte = codes + (tl.cast(block, tl.int64) * N + n[:, None]) * BLOCK_K + j[None, :]
            q = tl.load(byte, mask=live_n[:, None], other=0).to(tl.int32)
            # the code as the low mantissa bits of 2²³, minus (2²³ + 128): exact, without a slow conversion
            value = (q | _MAGIC).to(tl.float32, bitcast=True) - _MAGIC_BIAS
            group = block * BLOCK_K // GROUP_SIZE
            w_NK = value * tl.load(scale + group * N + n, mask=live_n, other=0.0)[:, None]
            acc = tl.dot(w_NK.to(x_KT.dtype), x_KT, acc, input_precision="ieee")
        total += acc
    store_tile(out, total, n, t, first_split, N, T, stride_out, PARALLEL)


def matmul_q8(x_TK: Tensor, weight: PackedInt8, out_TN: Tensor) -> None:
    """out = x Wᵀ. x has contiguous rows; `out` may be a column slice of a wider row-major tensor."""
    num_outputs, num_inputs = weight.shape
    num_rows = x_TK.shape[0]
    if num_rows == 0:
        return
    config = choose_config(num_outputs, num_inputs, num_rows)
    target = parts_or_out(config, out_TN)
    matmul_q8_kernel[grid_of(config, num_outputs, num_rows)](
        x_TK,
        weight.codes,
        weight.scale,
        target,
        num_rows,
        num_outputs,
        num_inputs,
        x_TK.stride(0),
        out_TN.stride(0),
        weight.codes.shape[0],
        GROUP_SIZE=weight.group_size,
        BLOCK_K=weight.block,
        EVEN_K=num_inputs % weight.block == 0,
        SPLITS=config.splits,
        PARALLEL=config.parallel,
        BLOCK_N=config.block_n,
        BLOCK_T=config.block_t,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    reduce_parts(config, target, out_TN)


def unpack_rows(weight: PackedInt8, rows: Tensor) -> Tensor:
    """W[rows] in float32, [len(rows), K]: the embedding look-up."""
    codes = weight.codes.index_select(1, rows).transpose(0, 1).reshape(rows.numel(), -1)
    values = codes[:, : weight.num_inputs].float() - 128
    groups = values.view(rows.numel(), -1, weight.group_size) * weight.scale[:, rows].t()[..., None]
    return groups.reshape(rows.numel(), weight.num_inputs)


def matmul_q8_oracle(x_TK: Tensor, weight: Int8Weight) -> Tensor:
    """x Wᵀ in float32 by the definition."""
    return x_TK.float() @ weight.dequantize().T

"""The 4-bit product.

    out[t, o] = Σ_i x[t, i] · W[o, i]        W[o, i] = codebook[q[o, i]] · scale[o, g(i)] + offset[o, g(i)]

x [T, K] and out [T, N] in the compute dtype, scale and offset float32; W is formed in float32, rounded once to the
compute dtype, and summed in float32.

Layout: the inputs are cut into chunks of 2 · HALF; byte j of a chunk holds input j in its low nibble and input
HALF + j in its high one, and chunks lie outermost: codes [chunks, N, HALF]. So a tile's bytes are one contiguous
run, both nibbles become the left operand of a `tl.dot` without a shuffle, and each half lies within one group:
its scales are one vector over the outputs (scale [G, N]). K is padded to whole chunks; x is masked there.

Codebook: GGUF's and GPTQ's are q + zero, which is arithmetic. NF4, FP4 and IQ4_NL are looked up with `tl.gather`,
which becomes one shared-memory load a weight from a table that fits 16 banks: no conflicts. (A plain `tl.load`
would be pipelined as a copy of every looked-up value; a select tree is 15 selects a weight, more than a decode
step can hide; a byte permute needs inline assembly, which the interpreter lacks.)

CPU paths: `eager_backend.EagerBackend.matmul` and `native/`. Oracle: `matmul_q4_oracle`.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from dataclasses import dataclass

import torch
from torch import Tensor

from perseid_kernels._triton import cdiv, tl, triton
from perseid_kernels.matmul_common import choose_config, grid_of, parts_or_out, reduce_parts, store_tile
from perseid_kernels.weights import Int4Weight

_MAGIC = tl.constexpr(0x4B000000)  # float32 2²³: its low mantissa bits count in ones
_MAGIC_VALUE = float(1 << 23)


@dataclass(frozen=True, slots=True)
class PackedInt4:
    """An Int4Weight in the layout above, on the device."""

    codes: Tensor  # uint8 [chunks, N, HALF]
    codebook: Tensor  # float32 [16]
    scale: Tensor  # float32 [G, N]
    offset: Tensor | None  # float32 [G, N]
    group_size: int
    num_inputs: int
    zero: int | None  # codebook[q] = q + zero, or None: look it up

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)"""
        return self.codes.shape[1], self.num_inputs

    @property
    def half(self) -> int:
        """HALF: inputs a nibble plane of a chunk holds."""
        return self.codes.shape[2]

    @property
    def nbytes(self) -> int:
        """Device bytes held."""
        offset = 0 if self.offset is None else self.offset.nbytes
        return self.codes.nbytes + self.codebook.nbytes + self.scale.nbytes + offset


def pack_int4(weight: Int4Weight, device: torch.device) -> PackedInt4:
    """Lay a canonical weight out for the kernel. Raises ValueError for a group size the kernel cannot cut."""
    num_outputs, num_inputs = weight.shape
    half = _half_of(weight.group_size)
    chunks = cdiv(num_inputs, 2 * half)
    plain = torch.zeros(num_outputs, chunks * 2 * half, dtype=torch.uint8)
    codes = weight.codes.cpu()
    plain[:, 0:num_inputs:2] = codes & 0xF
    plain[:, 1:num_inputs:2] = codes >> 4
    planes = plain.view(num_outputs, chunks, 2, half).permute(1, 2, 0, 3)
    return PackedInt4(
        codes=(planes[:, 0] | planes[:, 1] << 4).contiguous().to(device),
        codebook=weight.codebook.to(device),
        scale=weight.scale.t().contiguous().to(device),
        offset=None if weight.offset is None else weight.offset.t().contiguous().to(device),
        group_size=weight.group_size,
        num_inputs=num_inputs,
        zero=_affine_zero(weight.codebook),
    )


def _half_of(group_size: int) -> int:
    if group_size % 32 == 0:
        return 32
    if group_size % 16 == 0:
        return 16
    raise ValueError(f"group_size {group_size}: the Triton 4-bit product needs a multiple of 16 (tl.dot's least K)")


def _affine_zero(codebook: Tensor) -> int | None:
    """`zero` where codebook[q] = q + zero exactly, else None."""
    zero = float(codebook[0])
    steps = torch.arange(16, dtype=torch.float32, device=codebook.device) + zero
    return int(zero) if zero.is_integer() and torch.equal(codebook, steps) else None


@triton.jit
def dequantize_half(
    q,  # int32 codes [BLOCK_N, HALF]
    n,
    live,
    group,
    codebook,
    scale,
    offset,
    affine_bias,
    N,
    AFFINE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
):
    """codebook[q] · scale + offset in float32, for inputs that share a group."""
    if AFFINE:
        # q as the low mantissa bits of 2²³, minus (2²³ − zero): exact, and an int-to-float conversion is slow
        value = (q | _MAGIC).to(tl.float32, bitcast=True) - affine_bias
    else:
        table = tl.load(codebook + tl.arange(0, 16))
        value = tl.gather(table, q.reshape(q.shape[0] * q.shape[1]), 0).reshape(q.shape)
    s = tl.load(scale + group * N + n, mask=live, other=0.0)[:, None]
    if HAS_OFFSET:
        return tl.fma(value, s, tl.load(offset + group * N + n, mask=live, other=0.0)[:, None])
    return value * s


@triton.jit
def matmul_q4_kernel(
    x,  # [T, K]
    codes,  # uint8 [chunks, N, HALF]
    codebook,  # float32 [16], unused where AFFINE
    scale,  # float32 [G, N]
    offset,  # float32 [G, N], unused unless HAS_OFFSET
    out,  # [T, N], or float32 [SPLITS, T, N] where PARALLEL
    T,
    N,
    K,
    stride_x,
    stride_out,
    chunks,
    affine_bias,  # 2²³ − zero
    GROUP_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    AFFINE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    EVEN_K: tl.constexpr,  # K fills its chunks
    SPLITS: tl.constexpr,
    PARALLEL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    j = tl.arange(0, HALF)
    live_n = n < N
    live_t = (t < T)[None, :]
    x_rows = x + t.to(tl.int64)[None, :] * stride_x

    chunks_in_split = tl.cdiv(chunks, SPLITS)
    first_split = tl.program_id(2)
    last_split = first_split + 1 if PARALLEL else SPLITS
    total = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
    for split in range(first_split, last_split):
        acc = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
        for chunk in range(split * chunks_in_split, tl.minimum((split + 1) * chunks_in_split, chunks)):
            k_low = chunk * 2 * HALF + j
            k_high = k_low + HALF
            mask_low = live_t if EVEN_K else live_t & (k_low < K)[:, None]
            mask_high = live_t if EVEN_K else live_t & (k_high < K)[:, None]
            x_low = tl.load(x_rows + k_low[:, None], mask=mask_low, other=0.0)
            x_high = tl.load(x_rows + k_high[:, None], mask=mask_high, other=0.0)
            byte = codes + (tl.cast(chunk, tl.int64) * N + n[:, None]) * HALF + j[None, :]
            q = tl.load(byte, mask=live_n[:, None], other=0).to(tl.int32)
            group_low = chunk * 2 * HALF // GROUP_SIZE
            if GROUP_SIZE % (2 * HALF) == 0:
                group_high = group_low
            else:  # a padded high half may lie past the last group; x is zero there, so any finite scale will do
                group_high = tl.minimum(chunk * 2 * HALF + HALF, K - 1) // GROUP_SIZE
            w_low = dequantize_half(
                q & 0xF, n, live_n, group_low, codebook, scale, offset, affine_bias, N, AFFINE, HAS_OFFSET
            )
            acc = tl.dot(w_low.to(x_low.dtype), x_low, acc, input_precision="ieee")
            w_high = dequantize_half(
                q >> 4, n, live_n, group_high, codebook, scale, offset, affine_bias, N, AFFINE, HAS_OFFSET
            )
            acc = tl.dot(w_high.to(x_high.dtype), x_high, acc, input_precision="ieee")
        total += acc
    store_tile(out, total, n, t, first_split, N, T, stride_out, PARALLEL)


def matmul_q4(x_TK: Tensor, weight: PackedInt4, out_TN: Tensor) -> None:
    """out = x Wᵀ. x has contiguous rows; `out` may be a column slice of a wider row-major tensor."""
    num_outputs, num_inputs = weight.shape
    num_rows = x_TK.shape[0]
    if num_rows == 0:
        return
    config = choose_config(num_outputs, num_inputs, num_rows)
    target = parts_or_out(config, out_TN)
    matmul_q4_kernel[grid_of(config, num_outputs, num_rows)](
        x_TK,
        weight.codes,
        weight.codebook,
        weight.scale,
        weight.scale if weight.offset is None else weight.offset,
        target,
        num_rows,
        num_outputs,
        num_inputs,
        x_TK.stride(0),
        out_TN.stride(0),
        weight.codes.shape[0],
        _MAGIC_VALUE - (weight.zero or 0),
        GROUP_SIZE=weight.group_size,
        HALF=weight.half,
        AFFINE=weight.zero is not None,
        HAS_OFFSET=weight.offset is not None,
        EVEN_K=num_inputs % (2 * weight.half) == 0,
        SPLITS=config.splits,
        PARALLEL=config.parallel,
        BLOCK_N=config.block_n,
        BLOCK_T=config.block_t,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    reduce_parts(config, target, out_TN)


def unpack_rows(weight: PackedInt4, rows: Tensor) -> Tensor:
    """W[rows] in float32, [len(rows), K]: the embedding look-up."""
    codes = weight.codes.index_select(1, rows)
    both = torch.stack((codes & 0xF, codes >> 4), dim=1)  # [chunks, 2, rows, HALF]
    plain = both.permute(2, 0, 1, 3).reshape(rows.numel(), -1)[:, : weight.num_inputs]
    values = weight.codebook[plain.long()].view(rows.numel(), -1, weight.group_size)
    values = values * weight.scale[:, rows].t()[..., None]
    if weight.offset is not None:
        values = values + weight.offset[:, rows].t()[..., None]
    return values.reshape(rows.numel(), weight.num_inputs)


def matmul_q4_oracle(x_TK: Tensor, weight: Int4Weight) -> Tensor:
    """x Wᵀ in float32 by the definition."""
    return x_TK.float() @ weight.dequantize().T

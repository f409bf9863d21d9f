"""The 8-bit product, for embeddings and output heads (GGUF Q8_0 and Q6_K).

    out[t, o] = Σ_i x[t, i] · W[o, i]        W[o, i] = q[o, i] · scale[o, i // group_size]

x [T, K] and out [T, N] in the compute dtype, scale float32; W is formed in float32, rounded once to the compute
dtype, and summed in float32.

Layout: codes uint8 [chunks, N, CHUNK] = q + 128, a chunk of 128 inputs (64 where K is no multiple of 128; K is
padded to whole chunks and x is masked there), scale float32 [G, N].

CPU paths: `eager_backend.EagerBackend.matmul` and `native/`. Oracle: `matmul_q8_oracle`.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from dataclasses import dataclass

import torch
from torch import Tensor

from perseid_kernels._triton import cdiv, tl, triton
from perseid_kernels.devices import device_class
from perseid_kernels.matmul_common import (
    choose_config,
    grid_of,
    inputs_of_split,
    parts_or_out,
    per_word,
    reduce_parts,
    store_tile,
)
from perseid_kernels.weights import Int8Weight

_MAGIC = tl.constexpr(0x4B000000)  # float32 2²³: its low mantissa bits count in ones
_MAGIC_BIAS = tl.constexpr(float((1 << 23) + 128))


@dataclass(frozen=True, slots=True)
class PackedInt8:
    """An Int8Weight in the layout above, on the device."""

    codes: Tensor  # uint8 [chunks, N, CHUNK]
    scale: Tensor  # float32 [G, N]
    group_size: int
    num_inputs: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)"""
        return self.codes.shape[1], self.num_inputs

    @property
    def chunk(self) -> int:
        """CHUNK: inputs of one line."""
        return self.codes.shape[2]

    @property
    def nbytes(self) -> int:
        """Device bytes held."""
        return self.codes.nbytes + self.scale.nbytes


def pack_int8(weight: Int8Weight, device: torch.device) -> PackedInt8:
    """Lay a canonical weight out for the kernel. Raises ValueError for a group size the kernel cannot cut."""
    if weight.group_size % 16:
        raise ValueError(f"group_size {weight.group_size}: the Triton 8-bit product needs a multiple of 16")
    num_outputs, num_inputs = weight.shape
    chunk = 128 if num_inputs % 128 == 0 else 64
    chunks = cdiv(num_inputs, chunk)
    plain = torch.full((num_outputs, chunks * chunk), 128, dtype=torch.uint8)
    plain[:, :num_inputs] = (weight.codes.cpu().to(torch.int16) + 128).to(torch.uint8)
    return PackedInt8(
        codes=plain.view(num_outputs, chunks, chunk).transpose(0, 1).contiguous().to(device),
        scale=weight.scale.t().contiguous().to(device),
        group_size=weight.group_size,
        num_inputs=num_inputs,
    )


@triton.jit
def sum_split_q8(
    x_rows,  # pointers to the rows of x [1, BLOCK_T]
    live_t,  # [1, BLOCK_T]
    codes,
    scale,
    n,
    N,
    K,
    first_step,
    end_step,
    GROUP_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Σ over steps [first_step, end_step) of BLOCK_K inputs: float32 [BLOCK_N, BLOCK_T]."""
    UNIT: tl.constexpr = BLOCK_K if GROUP_SIZE % BLOCK_K == 0 else GROUP_SIZE if BLOCK_K % GROUP_SIZE == 0 else 16
    SCALES: tl.constexpr = BLOCK_K // UNIT
    STEPS: tl.constexpr = CHUNK // BLOCK_K  # in a chunk
    j = tl.arange(0, BLOCK_K)
    unit = tl.arange(0, SCALES) * UNIT
    live_n = (n < N)[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
    for step in range(first_step, end_step):
        k = step * BLOCK_K + j
        mask = live_t if EVEN_K else live_t & (k < K)[:, None]
        x_KT = tl.load(x_rows + k[:, None], mask=mask, other=0.0)
        line = tl.cast(step // STEPS, tl.int64) * N + n[:, None]
        q = tl.load(codes + line * CHUNK + (step % STEPS) * BLOCK_K + j[None, :], mask=live_n, other=0).to(tl.int32)
        # the code as the low mantissa bits of 2²³, minus (2²³ + 128): exact, without a slow conversion
        value = (q | _MAGIC).to(tl.float32, bitcast=True) - _MAGIC_BIAS
        group = (step * BLOCK_K + unit) // GROUP_SIZE
        if not EVEN_K:  # padding may lie past the last group; x is zero there, so any finite scale will do
            group = tl.minimum(group, (K - 1) // GROUP_SIZE)
        s = tl.load(scale + group[None, :] * N + n[:, None], mask=live_n, other=0.0)
        w_NK = value * per_word(s, BLOCK_K)
        acc = tl.dot(w_NK.to(x_KT.dtype), x_KT, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["T"])  # every batch size by the same code
def matmul_q8_kernel(
    x,  # [T, K]
    codes,  # uint8 [chunks, N, CHUNK]
    scale,  # float32 [G, N]
    out,  # [T, N], or float32 [SPLITS, T, N] where PARALLEL
    T,
    N,
    K,
    stride_x,
    stride_out,
    split_k,  # inputs in one split, a multiple of BLOCK_K
    GROUP_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    EVEN_K: tl.constexpr,  # K fills its steps
    SPLITS: tl.constexpr,
    PARALLEL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_t = tl.program_id(0) * BLOCK_T
    t = first_t + tl.arange(0, BLOCK_T)
    live_t = (t < T)[None, :]
    x_rows = x + t.to(tl.int64)[None, :] * stride_x
    steps = tl.cdiv(K, BLOCK_K)
    steps_in_split = split_k // BLOCK_K
    first = tl.program_id(2) if PARALLEL else 0
    total = sum_split_q8(
        x_rows, live_t, codes, scale, n, N, K,
        first * steps_in_split, tl.minimum((first + 1) * steps_in_split, steps),
        GROUP_SIZE, CHUNK, EVEN_K, BLOCK_N, BLOCK_T, BLOCK_K,
    )  # fmt: skip
    if not PARALLEL:
        for split in range(1, SPLITS):
            total += sum_split_q8(
                x_rows, live_t, codes, scale, n, N, K,
                split * steps_in_split, tl.minimum((split + 1) * steps_in_split, steps),
                GROUP_SIZE, CHUNK, EVEN_K, BLOCK_N, BLOCK_T, BLOCK_K,
            )  # fmt: skip
    store_tile(out, total, n, first_t, first, N, T, stride_out, PARALLEL)


def matmul_q8(x_TK: Tensor, weight: PackedInt8, out_TN: Tensor) -> None:
    """out = x Wᵀ. x has contiguous rows; `out` may be a column slice of a wider row-major tensor."""
    num_outputs, num_inputs = weight.shape
    num_rows = x_TK.shape[0]
    if num_rows == 0:
        return
    config = choose_config(num_outputs, num_inputs, num_rows, device_class(x_TK.device))
    target = parts_or_out(config, out_TN)
    block_k = min(weight.chunk, 64)
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
        inputs_of_split(num_outputs, num_inputs, weight.chunk),
        GROUP_SIZE=weight.group_size,
        CHUNK=weight.chunk,
        EVEN_K=num_inputs % block_k == 0,
        BLOCK_K=block_k,
        **config.constants(),
        **config.launch(),
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

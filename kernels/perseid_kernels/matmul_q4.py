"""The 4-bit product.

    out[t, o] = Σ_i x[t, i] · W[o, i]        W[o, i] = codebook[q[o, i]] · scale[o, g(i)] + offset[o, g(i)]

x [T, K] and out [T, N] in the compute dtype, scale and offset float32; W is formed in float32, rounded once to the
compute dtype, and summed in float32.

Layout: codes int32 [chunks, N, CHUNK / 8], a chunk of 128 inputs (64 where K is no multiple of 128; K is padded to
whole chunks and x is masked there). Word w of a line holds inputs 8 w … 8 w + 7, lowest bits first. So a tile's
codes are contiguous runs of whole words, a word is dequantised where it lies in a register, and its eight weights
are neighbours along K. Scale and offset are float32 [G, N], or, where float16 holds both exactly, pairs of them in
one int32 [G, N], the scale in the low half.

Codebook: GGUF's and GPTQ's are q + zero, which is arithmetic: a mask, a subtraction and a multiply-add a weight.
NF4, FP4 and IQ4_NL are looked up with `tl.gather`, which becomes one shared-memory load a weight from a table that
fits 16 banks: no conflicts. (A plain `tl.load` would be pipelined as a copy of every looked-up value; a select tree
is 15 selects a weight; a byte permute needs inline assembly, which the interpreter lacks.)

CPU paths: `eager_backend.EagerBackend.matmul` and `native/`. Oracle: `matmul_q4_oracle`.
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
from perseid_kernels.weights import Int4Weight

_ONE_BITS = 0x3F800000  # 1.0 in float32


@dataclass(frozen=True, slots=True)
class PackedInt4:
    """An Int4Weight in the layout above, on the device."""

    codes: Tensor  # int32 [chunks, N, CHUNK / 8]
    codebook: Tensor  # float32 [16]
    scale: Tensor  # float32 [G, N]; int32 where paired
    offset: Tensor | None  # float32 [G, N]; None where there is none, or where it is paired
    group_size: int
    num_inputs: int
    zero: int | None  # codebook[q] = q + zero, or None: look it up

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)"""
        return self.codes.shape[1], self.num_inputs

    @property
    def chunk(self) -> int:
        """CHUNK: inputs of one line."""
        return self.codes.shape[2] * 8

    @property
    def paired(self) -> bool:
        """Scale and offset share a word."""
        return self.scale.dtype == torch.int32

    @property
    def has_offset(self) -> bool:
        """Whether W has an offset at all."""
        return self.paired or self.offset is not None

    @property
    def nbytes(self) -> int:
        """Device bytes held."""
        offset = 0 if self.offset is None else self.offset.nbytes
        return self.codes.nbytes + self.codebook.nbytes + self.scale.nbytes + offset


def pack_int4(weight: Int4Weight, device: torch.device) -> PackedInt4:
    """Lay a canonical weight out for the kernel. Raises ValueError for a group size the kernel cannot cut."""
    if weight.group_size % 16:
        raise ValueError(f"group_size {weight.group_size}: the Triton 4-bit product needs a multiple of 16")
    num_outputs, num_inputs = weight.shape
    chunk = 128 if num_inputs % 128 == 0 else 64
    chunks = cdiv(num_inputs, chunk)
    padded = torch.zeros(num_outputs, chunks * chunk // 2, dtype=torch.uint8)
    padded[:, : num_inputs // 2] = weight.codes.cpu()
    words = padded.view(torch.int32).view(num_outputs, chunks, chunk // 8)  # little-endian: first input lowest
    scale, offset = _scales(weight)
    return PackedInt4(
        codes=words.transpose(0, 1).contiguous().to(device),
        codebook=weight.codebook.to(device),
        scale=scale.to(device),
        offset=None if offset is None else offset.to(device),
        group_size=weight.group_size,
        num_inputs=num_inputs,
        zero=_affine_zero(weight.codebook),
    )


def _scales(weight: Int4Weight) -> tuple[Tensor, Tensor | None]:
    """(scale, offset) as [G, N], or both in one word: GGUF's and GPTQ's are float16, and pairs halve their bytes.

    Not two float16 tensors: an asynchronous copy, which the kernel's pipeline is made of, moves at least four bytes.
    """
    scale = weight.scale.cpu().t().contiguous()
    if weight.offset is None:
        return scale, None
    offset = weight.offset.cpu().t().contiguous()
    both = torch.stack((scale, offset), dim=-1)
    narrow = both.to(torch.float16)
    if not torch.equal(narrow.float(), both):
        return scale, offset
    return narrow.view(torch.int32).squeeze(-1), None


def _float_scales(weight: PackedInt4, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scale and offset of some outputs as float32 [rows, G]."""
    scale = weight.scale[:, rows].t().contiguous()
    if weight.paired:
        both = scale.view(torch.float16).view(*scale.shape, 2).float()
        return both[..., 0], both[..., 1]
    return scale, None if weight.offset is None else weight.offset[:, rows].t()


def _affine_zero(codebook: Tensor) -> int | None:
    """`zero` where codebook[q] = q + zero exactly, else None."""
    zero = float(codebook[0])
    steps = torch.arange(16, dtype=torch.float32, device=codebook.device) + zero
    return int(zero) if zero.is_integer() and abs(zero) <= 64 and torch.equal(codebook, steps) else None


@triton.jit
def dequantize_plane(
    words,  # int32 [BLOCK_N, WORDS], eight codes each
    P: tl.constexpr,  # which of the eight
    table,  # float32 [16], read unless AFFINE
    one,  # the bits of 1.0, which the compiler must not know: two constants would be two instructions
    zero,
    s,  # float32, broadcastable to `words`
    o,
    AFFINE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
):
    """codebook[code P of each word] · s + o in float32."""
    if AFFINE:
        # The code stays where it is and becomes mantissa bits of a power of two whose ulp there is 1. Subtracting
        # that power is exact. Only the upper three planes are shifted, all by the same distance.
        PLACE: tl.constexpr = P if P < 5 else P - 5
        POWER: tl.constexpr = 23 - 4 * PLACE
        low = words if P < 5 else words >> 20
        bits = (low & (0xF << (4 * PLACE))) | (one + (POWER << 23))  # both in one instruction: `one` is in a register
        value = bits.to(tl.float32, bitcast=True) - ((1 << POWER) - zero)
    else:
        q = (words >> (4 * P)) & 0xF
        value = tl.gather(table, q.reshape(q.shape[0] * q.shape[1]), 0).reshape(q.shape)
    if HAS_OFFSET:
        return tl.fma(value, s, o)
    return value * s


@triton.jit
def dequantize_words(
    words,
    table,
    one,
    zero,
    s,
    o,
    dtype: tl.constexpr,
    AFFINE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
):
    """W [BLOCK_N, 8 · WORDS] in `dtype`; code P of word w is input 8 w + P, so P's bits are the last axes."""
    v0 = dequantize_plane(words, 0, table, one, zero, s, o, AFFINE, HAS_OFFSET).to(dtype)
    v1 = dequantize_plane(words, 1, table, one, zero, s, o, AFFINE, HAS_OFFSET).to(dtype)
    v2 = dequantize_plane(words, 2, table, one, zero, s, o, AFFINE, HAS_OFFSET).to(dtype)
    v3 = dequantize_plane(words, 3, table, one, zero, s, o, AFFINE, HAS_OFFSET).to(dtype)
    v4 = dequantize_plane(words, 4, table, one, zero, s, o, AFFINE, HAS_OFFSET).to(dtype)
    v5 = dequantize_plane(words, 5, table, one, zero, s, o, AFFINE, HAS_OFFSET).to(dtype)
    v6 = dequantize_plane(words, 6, table, one, zero, s, o, AFFINE, HAS_OFFSET).to(dtype)
    v7 = dequantize_plane(words, 7, table, one, zero, s, o, AFFINE, HAS_OFFSET).to(dtype)
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    return tl.join(even, odd).reshape(words.shape[0], 8 * words.shape[1])


@triton.jit
def sum_split_q4(
    x_rows,  # pointers to the rows of x [1, BLOCK_T]
    live_t,  # [1, BLOCK_T]
    codes,
    codebook,
    scale,
    offset,
    n,
    N,
    K,
    one,
    zero,
    first_step,
    end_step,
    GROUP_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    AFFINE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    PAIRED: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Σ over steps [first_step, end_step) of BLOCK_K inputs: float32 [BLOCK_N, BLOCK_T]."""
    # Inputs that are sure to share a group: a whole step, a group, or (odd group sizes) the 16 that always do.
    UNIT: tl.constexpr = BLOCK_K if GROUP_SIZE % BLOCK_K == 0 else GROUP_SIZE if BLOCK_K % GROUP_SIZE == 0 else 16
    SCALES: tl.constexpr = BLOCK_K // UNIT
    WORDS: tl.constexpr = BLOCK_K // 8
    STEPS: tl.constexpr = CHUNK // BLOCK_K  # in a chunk
    k_in_step = tl.arange(0, BLOCK_K)
    word = tl.arange(0, WORDS)
    unit = tl.arange(0, SCALES) * UNIT
    live_n = (n < N)[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
    table = tl.load(codebook + tl.arange(0, 16))
    for step in range(first_step, end_step):
        k = step * BLOCK_K + k_in_step
        mask = live_t if EVEN_K else live_t & (k < K)[:, None]
        x_KT = tl.load(x_rows + k[:, None], mask=mask, other=0.0)
        line = tl.cast(step // STEPS, tl.int64) * N + n[:, None]
        at = line * (CHUNK // 8) + (step % STEPS) * WORDS + word[None, :]
        words = tl.load(codes + at, mask=live_n, other=0)
        group = (step * BLOCK_K + unit) // GROUP_SIZE
        if not EVEN_K:  # padding may lie past the last group; x is zero there, so any finite scale will do
            group = tl.minimum(group, (K - 1) // GROUP_SIZE)
        at_group = group[None, :] * N + n[:, None]
        s = tl.load(scale + at_group, mask=live_n, other=0)
        o = s
        if PAIRED:
            o = (s >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            s = s.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        elif HAS_OFFSET:
            o = tl.load(offset + at_group, mask=live_n, other=0)
        s = per_word(s, WORDS)
        o = per_word(o, WORDS)
        w_NK = dequantize_words(words, table, one, zero, s, o, x_KT.dtype, AFFINE, HAS_OFFSET)
        acc = tl.dot(w_NK, x_KT, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["T"])  # every batch size by the same code
def matmul_q4_kernel(
    x,  # [T, K]
    codes,  # int32 [chunks, N, CHUNK / 8]
    codebook,  # float32 [16], looked up unless AFFINE
    scale,  # float32 [G, N]; int32 where PAIRED
    offset,  # float32 [G, N], read where HAS_OFFSET and not PAIRED
    out,  # [T, N], or float32 [SPLITS, T, N] where PARALLEL
    T,
    N,
    K,
    stride_x,
    stride_out,
    split_k,  # inputs in one split, a multiple of BLOCK_K
    one,  # int: the bits of 1.0
    zero,  # float: codebook[q] = q + zero where AFFINE
    GROUP_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    AFFINE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    PAIRED: tl.constexpr,
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
    total = sum_split_q4(
        x_rows, live_t, codes, codebook, scale, offset, n, N, K, one, zero,
        first * steps_in_split, tl.minimum((first + 1) * steps_in_split, steps),
        GROUP_SIZE, CHUNK, AFFINE, HAS_OFFSET, PAIRED, EVEN_K, BLOCK_N, BLOCK_T, BLOCK_K,
    )  # fmt: skip
    if not PARALLEL:
        for split in range(1, SPLITS):
            total += sum_split_q4(
                x_rows, live_t, codes, codebook, scale, offset, n, N, K, one, zero,
                split * steps_in_split, tl.minimum((split + 1) * steps_in_split, steps),
                GROUP_SIZE, CHUNK, AFFINE, HAS_OFFSET, PAIRED, EVEN_K, BLOCK_N, BLOCK_T, BLOCK_K,
            )  # fmt: skip
    store_tile(out, total, n, first_t, first, N, T, stride_out, PARALLEL)


def matmul_q4(x_TK: Tensor, weight: PackedInt4, out_TN: Tensor) -> None:
    """out = x Wᵀ. x has contiguous rows; `out` may be a column slice of a wider row-major tensor."""
    num_outputs, num_inputs = weight.shape
    num_rows = x_TK.shape[0]
    if num_rows == 0:
        return
    config = choose_config(num_outputs, num_inputs, num_rows, device_class(x_TK.device))
    target = parts_or_out(config, out_TN)
    block_k = min(weight.chunk, config.tile.block_k)
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
        inputs_of_split(num_outputs, num_inputs, weight.chunk),
        _ONE_BITS,
        float(weight.zero or 0),
        GROUP_SIZE=weight.group_size,
        CHUNK=weight.chunk,
        AFFINE=weight.zero is not None,
        HAS_OFFSET=weight.has_offset,
        PAIRED=weight.paired,
        EVEN_K=num_inputs % block_k == 0,
        BLOCK_K=block_k,
        **config.constants(),
        **config.launch(),
    )
    reduce_parts(config, target, out_TN)


def unpack_rows(weight: PackedInt4, rows: Tensor) -> Tensor:
    """W[rows] in float32, [len(rows), K]: the embedding look-up."""
    words = weight.codes.index_select(1, rows)[..., None]
    codes = (words >> torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)) & 0xF  # [chunks, rows, ., 8]
    plain = codes.transpose(0, 1).reshape(rows.numel(), -1)[:, : weight.num_inputs]
    values = weight.codebook[plain.long()].view(rows.numel(), -1, weight.group_size)
    scale, offset = _float_scales(weight, rows)
    values = values * scale[..., None]
    if offset is not None:
        values = values + offset[..., None]
    return values.reshape(rows.numel(), weight.num_inputs)


def matmul_q4_oracle(x_TK: Tensor, weight: Int4Weight) -> Tensor:
    """x Wᵀ in float32 by the definition."""
    return x_TK.float() @ weight.dequantize().T

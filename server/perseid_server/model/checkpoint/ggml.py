"""GGUF's quantised blocks, turned into the canonical forms without any rounding.

Shape legend: N rows (outputs), B blocks a row. Layouts: https://github.com/ggml-org/ggml (ggml-common.h). Scales are
float16 in the file; products such as d·sc are formed in float32 exactly as llama.cpp and `gguf.dequantize` form them.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from perseid_kernels.weights import DenseWeight, Int4Weight, Int8Weight, Weight

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_ZERO_TO_15 = torch.arange(16, dtype=torch.float32)


def q4_0(rows: Bytes) -> Int4Weight:
    """d · (q - 8), groups of 32. Block: d, 16 bytes (low nibbles are elements 0–15, high 16–31)."""
    blocks = _blocks(rows, 18)
    return Int4Weight(_halves(blocks[..., 2:]), _ZERO_TO_15 - 8, _tensor(_float16(blocks, 0)), None, 32)


def q4_1(rows: Bytes) -> Int4Weight:
    """d · q + m, groups of 32. Block: d, m, 16 bytes as in Q4_0."""
    blocks = _blocks(rows, 20)
    scale, offset = _tensor(_float16(blocks, 0)), _tensor(_float16(blocks, 2))
    return Int4Weight(_halves(blocks[..., 4:]), _ZERO_TO_15.clone(), scale, offset, 32)


def q4_k(rows: Bytes) -> Int4Weight:
    """d·sc · q - dmin·m, groups of 32, eight in a block. Block: d, dmin, 12 bytes of 6-bit sc and m, 128 bytes
    (four times 32: low nibbles are one group, high nibbles the next)."""
    blocks = _blocks(rows, 144)
    sc, m = _six_bit_pairs(blocks[..., 4:16])
    scale = _float16(blocks, 0)[..., None] * sc
    offset = -(_float16(blocks, 2)[..., None] * m)
    num_rows = rows.shape[0]
    codes = _halves(blocks[..., 16:].reshape(num_rows, -1, 32))
    flat = (num_rows, -1)
    return Int4Weight(codes, _ZERO_TO_15.clone(), _tensor(scale.reshape(flat)), _tensor(offset.reshape(flat)), 32)


def q8_0(rows: Bytes) -> Int8Weight:
    """d · q, groups of 32. Block: d, 32 signed bytes."""
    blocks = _blocks(rows, 34)
    codes = np.ascontiguousarray(blocks[..., 2:]).view(np.int8).reshape(rows.shape[0], -1)
    return Int8Weight(torch.from_numpy(codes), _tensor(_float16(blocks, 0)), 32)


def q6_k(rows: Bytes) -> Int8Weight:
    """d·sc · (q - 32), groups of 16, sixteen in a block. Block: 128 bytes of low nibbles, 64 of high bit pairs, 16
    signed sc, d."""
    blocks = _blocks(rows, 210)
    shape = blocks.shape[:2]
    low_bytes = blocks[..., :128].reshape(*shape, 2, 1, 64)
    low = np.concatenate((low_bytes & 0xF, low_bytes >> 4), axis=3).reshape(*shape, 8, 32)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(4, 1)
    high = (blocks[..., 128:192].reshape(*shape, 2, 1, 32) >> shifts) & 3
    codes = (low | (high.reshape(*shape, 8, 32) << 4)).view(np.int8) - np.int8(32)
    sc = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8).astype(np.float32)
    scale = _float16(blocks, 208)[..., None] * sc
    flat = (rows.shape[0], -1)
    return Int8Weight(torch.from_numpy(codes.reshape(flat)), _tensor(scale.reshape(flat)), 16)


def f32(rows: Bytes) -> DenseWeight:
    """float32 as it is."""
    return DenseWeight(torch.from_numpy(rows).view(torch.float32))


def f16(rows: Bytes) -> DenseWeight:
    """float16 as it is."""
    return DenseWeight(torch.from_numpy(rows).view(torch.float16))


def bf16(rows: Bytes) -> DenseWeight:
    """bfloat16 as it is."""
    return DenseWeight(torch.from_numpy(rows).view(torch.bfloat16))


DECODERS: Mapping[str, Callable[[Bytes], Weight]] = {
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q4_K": q4_k,
    "Q8_0": q8_0,
    "Q6_K": q6_k,
    "F32": f32,
    "F16": f16,
    "BF16": bf16,
}
"""From a matrix's bytes, uint8 [N, bytes a row], to its canonical form."""


def _blocks(rows: Bytes, nbytes: int) -> Bytes:
    return rows.reshape(rows.shape[0], -1, nbytes)


def _float16(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte `at` of each block, as float32 [N, B]."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16)[..., 0].astype(np.float32)


def _tensor(values: Floats) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def _halves(packed: Bytes) -> torch.Tensor:
    """Low nibbles hold the first half of each block, high nibbles the second: repack neighbours into one byte.

    uint8 [N, B, H] → uint8 [N, B·H], each byte with input 2j in its low and 2j+1 in its high nibble.
    """
    even, odd = packed[..., 0::2], packed[..., 1::2]
    first = (even & 0xF) | (odd << 4)
    second = (even >> 4) | (odd & 0xF0)
    return torch.from_numpy(np.concatenate((first, second), axis=-1).reshape(packed.shape[0], -1))


def _six_bit_pairs(packed: Bytes) -> tuple[Floats, Floats]:
    """Eight scales and eight minima of 6 bits in 12 bytes: [N, B, 12] → two float32 [N, B, 8]."""
    scales, minima, tops = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    sc = np.concatenate((scales & 0x3F, (tops & 0xF) | ((scales >> 2) & 0x30)), axis=-1)
    m = np.concatenate((minima & 0x3F, (tops >> 4) | ((minima >> 2) & 0x30)), axis=-1)
    return sc.astype(np.float32), m.astype(np.float32)

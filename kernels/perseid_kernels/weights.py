"""The forms a frozen weight is held in. One form serves NF4, GPTQ, AWQ and GGUF's 4-bit types exactly.

    W[o, i] = codebook[q[o, i]] · scale[o, i // group_size] + offset[o, i // group_size]

These are the canonical, device-independent forms that loaders produce and oracles read. A backend turns each into
its own packed layout once, at load (`Backend.pack`), and the canonical form is dropped.

Shape legend: N outputs, K inputs, G = K / group_size groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """4-bit codes with a codebook. `codes` packs input 2j in the low and 2j+1 in the high nibble of byte j."""

    codes: Tensor  # uint8 [N, K/2]
    codebook: Tensor  # float32 [16]
    scale: Tensor  # float32 [N, G]
    offset: Tensor | None  # float32 [N, G], None = 0
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)"""
        return self.codes.shape[0], self.codes.shape[1] * 2

    def dequantize(self) -> Tensor:
        """The float32 [N, K] matrix this stands for: the oracle of every 4-bit product."""
        num_outputs, num_inputs = self.shape
        codes = torch.stack((self.codes & 0xF, self.codes >> 4), dim=-1).view(num_outputs, num_inputs)
        values = self.codebook[codes.long()].view(num_outputs, -1, self.group_size) * self.scale[..., None]
        if self.offset is not None:
            values = values + self.offset[..., None]
        return values.view(num_outputs, num_inputs)


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """8-bit signed codes with a scale per group: W[o, i] = q[o, i] · scale[o, i // group_size].

    Holds GGUF Q8_0 (group 32) and Q6_K (group 16) exactly; used for embeddings and output heads.
    """

    codes: Tensor  # int8 [N, K]
    scale: Tensor  # float32 [N, G]
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)"""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> Tensor:
        """The float32 [N, K] matrix this stands for."""
        num_outputs, num_inputs = self.shape
        groups = self.codes.view(num_outputs, -1, self.group_size).to(torch.float32)
        return (groups * self.scale[..., None]).view(num_outputs, num_inputs)


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """A weight kept in its file's 16- or 32-bit type (norms and biases are plain tensors, not this)."""

    values: Tensor  # float32, bfloat16 or float16 [N, K]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)"""
        return self.values.shape[0], self.values.shape[1]

    def dequantize(self) -> Tensor:
        """The float32 [N, K] matrix this stands for."""
        return self.values.to(torch.float32)


Weight = Int4Weight | Int8Weight | DenseWeight


def quantize_int8(weight: DenseWeight, group_size: int) -> Int8Weight:
    """As GGUF's Q8_0 rounds: scale = max |W| / 127 of each group, q the nearest whole number to W / scale."""
    values_NGK = weight.values.float().view(weight.shape[0], -1, group_size)
    scale_NG = values_NGK.abs().amax(dim=-1) / 127.0
    inverse_NG = torch.where(scale_NG > 0, 1.0 / scale_NG, 0.0)
    codes = (values_NGK * inverse_NG[..., None]).round().clamp(-127, 127).to(torch.int8)
    return Int8Weight(codes.view(weight.shape), scale_NG, group_size)


def merge_outputs(parts: list[Weight]) -> list[Weight]:
    """Join neighbours that can share one product (same kind, group size, codebook, offset or none) along N.

    The result, in order, covers the same outputs: [q, k, v] in Q4_1 becomes one weight; v in Q6_K stays apart.
    """
    merged: list[Weight] = []
    for part in parts:
        joined = _join(merged[-1], part) if merged else None
        if joined is None:
            merged.append(part)
        else:
            merged[-1] = joined
    return merged


def _join(first: Weight, second: Weight) -> Weight | None:
    match first, second:
        case Int4Weight(), Int4Weight():
            alike = (
                first.group_size == second.group_size
                and torch.equal(first.codebook, second.codebook)
                and (first.offset is None) == (second.offset is None)
            )
            if not alike:
                return None
            offset = (
                torch.cat((first.offset, second.offset))
                if first.offset is not None and second.offset is not None
                else None
            )
            return Int4Weight(
                torch.cat((first.codes, second.codes)),
                first.codebook,
                torch.cat((first.scale, second.scale)),
                offset,
                first.group_size,
            )
        case Int8Weight(), Int8Weight() if first.group_size == second.group_size:
            return Int8Weight(
                torch.cat((first.codes, second.codes)),
                torch.cat((first.scale, second.scale)),
                first.group_size,
            )
        case DenseWeight(), DenseWeight() if first.values.dtype == second.values.dtype:
            return DenseWeight(torch.cat((first.values, second.values)))
    return None


def take_rows(weight: Weight, rows: slice | Tensor) -> Weight:
    """The same weight with only these outputs."""
    match weight:
        case Int4Weight():
            offset = None if weight.offset is None else weight.offset[rows]
            return Int4Weight(weight.codes[rows], weight.codebook, weight.scale[rows], offset, weight.group_size)
        case Int8Weight():
            return Int8Weight(weight.codes[rows], weight.scale[rows], weight.group_size)
        case DenseWeight():
            return DenseWeight(weight.values[rows])

"""Canonical weights in the layout of `weight.h`: panels of outputs, the inputs one after the other.

Shape legend: N outputs, K inputs, G groups, P panels. Outputs beyond N are zeros that nobody reads.
"""

import ctypes
import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from perseid_kernels.weights import DenseWeight, Int4Weight, Int8Weight, Weight, quantize_int8

_AFFINE4, _CODEBOOK4, _INT8, _DENSE, _QUADS4, _QUADS8 = range(6)
_QUAD_GROUP = 16  # groups are multiples of it, or the integer product cannot take them
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class _Weight(ctypes.Structure):
    """`struct Weight` of weight.h."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("num_outputs", ctypes.c_int64),
        ("num_inputs", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("planes", ctypes.c_int64),
        ("codes", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("codebook", ctypes.c_float * 16),
    )


@dataclass(frozen=True, slots=True)
class NativeWeight:
    """A packed weight: its tensors, and the struct that points into them."""

    shape: tuple[int, int]
    tensors: tuple[Tensor, ...]
    struct: _Weight = field(repr=False)

    @property
    def address(self) -> int:
        """Of the struct, for the library."""
        return ctypes.addressof(self.struct)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self.tensors) + ctypes.sizeof(self.struct)


@dataclass(frozen=True, slots=True)
class Layout:
    """What the library's products want."""

    panel: int  # outputs of a panel
    planes: int  # bytes of an activation in the integer product, for codes that are whole numbers; 0: float32 for all


def pack(weight: Weight, layout: Layout) -> NativeWeight:
    """The packed form; decoding it gives the canonical values bit by bit."""
    match weight:
        case Int4Weight():
            packed = _pack_int4(weight, layout)
        case Int8Weight():
            packed = _pack_int8(weight, layout)
        case DenseWeight():
            values = weight.values if weight.values.dtype in _TYPES else weight.values.float()
            packed = _finish(_DENSE, weight, weight.shape[1], _panels(values, layout.panel))
    packed.struct.planes = layout.planes
    return packed


def pack_draft(weight: Weight, layout: Layout) -> NativeWeight:
    """For drafts, which are checked: what takes fewer bytes to read and fewer to multiply."""
    group = math.gcd(weight.shape[1], 2 * _QUAD_GROUP)
    if isinstance(weight, DenseWeight) and group >= _QUAD_GROUP:
        weight = quantize_int8(weight, group)
    return pack(weight, replace(layout, planes=min(layout.planes, 1)))


def _pack_int8(weight: Int8Weight, layout: Layout) -> NativeWeight:
    scale = _panels(_smallest(weight.scale), layout.panel)
    if layout.planes and weight.group_size % _QUAD_GROUP == 0:
        codes = _quads((weight.codes.to(torch.int16) + 128).to(torch.uint8), weight.group_size, layout.panel)
        return _finish(_QUADS8, weight, weight.group_size, codes, scale, None, torch.arange(16.0) - 128)
    return _finish(_INT8, weight, weight.group_size, _panels(weight.codes, layout.panel), scale)


def _pack_int4(weight: Int4Weight, layout: Layout) -> NativeWeight:
    kind = _AFFINE4 if _is_affine(weight) else _CODEBOOK4
    if layout.planes and kind == _AFFINE4 and weight.group_size % _QUAD_GROUP == 0:
        kind, nibbles = _QUADS4, _quads(_codes(weight), weight.group_size, layout.panel)
    else:
        nibbles = _panels(_codes(weight), layout.panel)
    low, high = nibbles.chunk(2, dim=2)
    scales = _scales(weight, layout.panel)
    return _finish(kind, weight, weight.group_size, low | (high << 4), *scales, weight.codebook)


def _codes(weight: Int4Weight) -> Tensor:
    """uint8 [N, K]"""
    return torch.stack((weight.codes & 0xF, weight.codes >> 4), dim=-1).view(weight.shape)


def _scales(weight: Int4Weight, panel: int) -> tuple[Tensor, Tensor | None]:
    """Scale and offset in panels, both of one type."""
    if weight.offset is None:
        return _panels(_smallest(weight.scale), panel), None
    scale, offset = _smallest(torch.stack((weight.scale, weight.offset)))
    return _panels(scale, panel), _panels(offset, panel)


def _is_affine(weight: Int4Weight) -> bool:
    """Whether the codes can be taken as numbers (weight.h says when)."""
    first = weight.codebook[0]
    steps = torch.equal(weight.codebook, first + torch.arange(16.0))
    return steps and bool(first == first.round()) and (weight.offset is None or first.item() == 0)


def _finish(
    kind: int,
    weight: Weight,
    group: int,
    codes: Tensor,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    codebook: Tensor | None = None,
) -> NativeWeight:
    num_outputs, num_inputs = weight.shape
    struct = _Weight(
        kind=kind,
        type=_TYPES[codes.dtype if scale is None else scale.dtype],
        num_outputs=num_outputs,
        num_inputs=num_inputs,
        group=group,
        codes=codes.data_ptr(),
        scale=None if scale is None else scale.data_ptr(),
        offset=None if offset is None else offset.data_ptr(),
    )
    if codebook is not None:
        struct.codebook[:] = codebook.tolist()
    held = tuple(tensor for tensor in (codes, scale, offset) if tensor is not None)
    return NativeWeight((num_outputs, num_inputs), held, struct)


def _smallest(values: Tensor) -> Tensor:
    """As float16 where that changes no value (GGUF's scales come from it), else float32."""
    half = values.to(torch.float16)
    return half if torch.equal(half.to(torch.float32), values) else values.to(torch.float32)


def _panels(rows_NX: Tensor, panel: int) -> Tensor:
    """[N, X] → [P, X, panel] contiguous."""
    num_rows, width = rows_NX.shape
    padded = pad(rows_NX, (0, 0, 0, -num_rows % panel))
    return padded.view(-1, panel, width).transpose(1, 2).contiguous()


def _quads(codes_NK: Tensor, group: int, panel: int) -> Tensor:
    """uint8 [N, K] → [P, blocks, quads of a block, outputs of a panel · 4 inputs] contiguous."""
    num_outputs, num_inputs = codes_NK.shape
    block = 32 if group % 32 == 0 else 16
    padded = pad(codes_NK, (0, 0, 0, -num_outputs % panel))
    quads = padded.view(-1, panel, num_inputs // block, block // 4, 4).permute(0, 2, 3, 1, 4)
    return quads.reshape(quads.shape[0], num_inputs // block, block // 4, panel * 4)

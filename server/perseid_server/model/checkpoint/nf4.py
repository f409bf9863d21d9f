"""NF4 with double quantisation: 4-bit codes of a 16-entry codebook, block maxima in 8 bits.

    absmax[b] = max |w| over block b of 64;   q = nearest entry of NF4 to w / absmax[b]
    absmax itself: mean subtracted, then 8-bit codes of a dynamic map, scaled by the maximum of 256 of them
    w ≈ NF4[q] · (DYNAMIC[c] · max[b // 256] + mean)

Blocks run over the row-major flattened matrix, as in bitsandbytes: with `in_features` no multiple of 64 a block
spans two rows. Codes and dequantised values are those of bitsandbytes 0.50's CPU `quantize_4bit(quant_type="nf4",
compress_statistics=True)`, bit for bit. Source: QLoRA, arXiv:2305.14314.
"""

from functools import cache
from math import gcd

import torch
from torch import Tensor
from torch.nn.functional import pad

from perseid_kernels.weights import Int4Weight
from perseid_server.errors import UnsupportedModel

BLOCK = 64
_NESTED_BLOCK = 256
_CHUNK = BLOCK << 16  # elements quantised at a time: bounds the float32 copies to some 50 MB
_MIN_GROUP = 16
_MAX_GROUP = 128

NF4 = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=torch.float32,
)
"""Quantiles of the normal distribution, scaled to [-1, 1]; QLoRA, appendix E."""


def quantize_nf4(weight_NK: Tensor) -> Int4Weight:
    """Quantise a 16- or 32-bit matrix. UnsupportedModel when it holds NaN or infinity."""
    if not torch.isfinite(weight_NK).all():
        raise UnsupportedModel("a weight holds NaN or infinity; the checkpoint is damaged")
    num_outputs, num_inputs = weight_NK.shape
    row_group(num_inputs, BLOCK)  # refuses a width that cannot be packed
    parts = [_quantized(part) for part in weight_NK.reshape(-1).split(_CHUNK)]
    absmax = torch.cat([absmax for _, absmax in parts])
    return Int4Weight(
        torch.cat([packed for packed, _ in parts]).view(num_outputs, num_inputs // 2),
        NF4.clone(),
        scale_per_row(_double_quantized(absmax), weight_NK.shape, BLOCK),
        None,
        row_group(num_inputs, BLOCK),
    )


def _quantized(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, two a byte, and block maxima of a run of whole blocks (the last one may be short)."""
    blocks, absmax = _blocks(flat.to(torch.float32), BLOCK)
    codes = torch.bucketize(_normed(blocks, absmax), _midpoints(NF4), out_int32=True).to(torch.uint8)
    codes = codes.view(-1)[: len(flat)]
    return codes[0::2] | (codes[1::2] << 4), absmax


def row_group(num_inputs: int, block: int) -> int:
    """The longest group that lies in one block and one row wherever it starts, at most 128 inputs."""
    group = gcd(num_inputs, block, _MAX_GROUP)
    if group < _MIN_GROUP:
        raise UnsupportedModel(
            f"a linear with {num_inputs} inputs in blocks of {block} cannot be held in 4 bits: expected a multiple of "
            f"{_MIN_GROUP} for both"
        )
    return group


def scale_per_row(absmax: Tensor, shape: tuple[int, ...] | torch.Size, block: int) -> Tensor:
    """Scales of flattened blocks, float32 [blocks], as scales of groups within rows: float32 [N, K / group]."""
    num_outputs, num_inputs = shape
    group = row_group(num_inputs, block)
    starts = torch.arange(0, num_outputs * num_inputs, group)
    return absmax[starts // block].view(num_outputs, num_inputs // group)


def _blocks(flat: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """[blocks, block], the last filled up with zeros, and the maximum magnitude of each."""
    blocks = pad(flat, (0, -len(flat) % block)).view(-1, block)
    return blocks, blocks.abs().amax(dim=1)


def _normed(blocks: Tensor, absmax: Tensor) -> Tensor:
    # A product with the reciprocal, not a quotient: the last bit decides ties.
    return (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp_(-1, 1)


def _double_quantized(absmax: Tensor) -> Tensor:
    """What is left of the block maxima after their own quantisation."""
    mean = absmax.mean()
    blocks, nested_absmax = _blocks(absmax - mean, _NESTED_BLOCK)
    # bitsandbytes' CPU code rounds to a grid of 65536 values and looks the nearest level up for each.
    grid = torch.floor((_normed(blocks, nested_absmax) + 1) * 0.5 * 65535 + 0.5) / 65535 * 2 - 1
    levels = dynamic_map()
    codes = torch.bucketize(grid, _midpoints(levels), out_int32=True)
    values = levels[codes] * nested_absmax[:, None]
    return values.reshape(-1)[: len(absmax)] + mean


def _midpoints(levels: Tensor) -> Tensor:
    return (levels[:-1] + levels[1:]) / 2


@cache
def dynamic_map() -> Tensor:
    """The 256 signed levels of bitsandbytes' dynamic 8-bit type, ascending: float32 [256].

    Seven decades from 1e-6 to 1; decade i is cut into 2^i steps whose midpoints are the levels, with either sign;
    beside them 0 and 1. Source: arXiv:2110.02861, section 2.
    """
    levels = [0.0, 1.0]
    for decade in range(7):
        steps = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        centres = (steps[:-1] + steps[1:]) / 2.0
        positive = ((10 ** (decade - 6)) * centres).tolist()
        levels += positive + [-level for level in positive]
    return torch.tensor(sorted(levels), dtype=torch.float32)

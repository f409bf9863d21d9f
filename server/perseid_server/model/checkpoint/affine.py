"""Codes with a zero point, W = s · (q - z), as GPTQ and AWQ store them, in the canonical form.

Exact: s has at most 11 significant bits (float16), q and z at most 5, so s·q, s·z and their difference are all
float32 numbers.
"""

import torch
from torch import Tensor

from perseid_kernels.weights import Int4Weight
from perseid_server.errors import UnsupportedModel

_MAX_GROUP = 128


def affine_weight(codes: Tensor, scale_GN: Tensor, zero_GN: Tensor) -> Int4Weight:
    """`codes` uint8 [N, K/2] as in Int4Weight; scale and zero as the files have them, one row a group.

    Groups longer than 128 are cut into equal ones of 128, which changes nothing but their number.
    """
    num_inputs = codes.shape[1] * 2
    group = num_inputs // scale_GN.shape[0]
    repeats = max(1, group // _MAX_GROUP)
    if group % repeats or group // repeats > _MAX_GROUP:
        raise UnsupportedModel(f"group size {group} is not supported; expected a divisor or a multiple of 128")
    scale = scale_GN.to(torch.float32).t().repeat_interleave(repeats, dim=1).contiguous()
    zero = zero_GN.to(torch.float32).t().repeat_interleave(repeats, dim=1).contiguous()
    levels = torch.arange(16, dtype=torch.float32)
    first = zero.flatten()[0]
    if torch.all(zero == first):  # symmetric quantisation: one zero point for all
        return Int4Weight(codes, levels - first, scale, None, group // repeats)
    return Int4Weight(codes, levels, scale, -(scale * zero), group // repeats)


def nibbles(packed: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight codes out of each int32: [R, C] → uint8 [R, 8·C]; nibble k goes to place `order[k]` of its eight."""
    rows, columns = packed.shape
    two = packed.contiguous().view(torch.uint8).view(rows, columns, 4)
    in_file_order = torch.stack((two & 0xF, two >> 4), dim=-1).view(rows, columns, 8)
    placed = torch.empty_like(in_file_order)
    placed[..., list(order)] = in_file_order
    return placed.view(rows, columns * 8)

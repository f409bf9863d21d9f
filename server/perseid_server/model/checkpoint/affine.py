"""Codes with a zero point, W = s · (q - z), as GPTQ and AWQ store them, in the canonical form.

Exact: s has at most 11 significant bits (float16), q and z at most 5, so s·q, s·z and their difference are all
float32 numbers.
"""

import torch
from torch import Tensor

from perseid_kernels.weights import Int4Weight
from perseid_server.model.checkpoint.nf4 import row_group


def num_groups(num_inputs: int, group_size: int) -> int:
    """Groups of a row, the last of which may be short. A group size of -1 stands for one group."""
    return 1 if group_size <= 0 else -(-num_inputs // group_size)


def affine_weight(codes: Tensor, scale_GN: Tensor, zero_GN: Tensor, group_size: int) -> Int4Weight:
    """`codes` uint8 [N, K/2] as in Int4Weight; scale and zero as the files have them, one row a group.

    Long groups, and those that do not divide K, are cut into equal ones, which changes nothing but their number.
    """
    num_inputs = codes.shape[1] * 2
    stored = group_size if group_size > 0 else num_inputs
    group = row_group(num_inputs, stored)
    stored_group = torch.arange(0, num_inputs, group) // stored
    scale = scale_GN.to(torch.float32)[stored_group].t().contiguous()
    zero = zero_GN.to(torch.float32)[stored_group].t().contiguous()
    levels = torch.arange(16, dtype=torch.float32)
    first = zero.flatten()[0]
    if torch.all(zero == first):  # symmetric quantisation: one zero point for all
        return Int4Weight(codes, levels - first, scale, None, group)
    return Int4Weight(codes, levels, scale, -(scale * zero), group)


def nibbles(packed: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight codes out of each int32: [R, C] → uint8 [R, 8·C]; nibble k goes to place `order[k]` of its eight."""
    rows, columns = packed.shape
    two = packed.contiguous().view(torch.uint8).view(rows, columns, 4)
    in_file_order = torch.stack((two & 0xF, two >> 4), dim=-1).view(rows, columns, 8)
    placed = torch.empty_like(in_file_order)
    placed[..., list(order)] = in_file_order
    return placed.view(rows, columns * 8)

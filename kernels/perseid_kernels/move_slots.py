"""K and V that move to other slots of the paged cache: what was accepted of trees goes behind its prefix.

    for each path, for its moves i in order:    cache[targets[i]] = cache[sources[i]]     in K and V of every layer

One launch for all layers: the caches' addresses stand in a table. A program takes some columns of one cache through the
moves of one path, one after the other, so a slot that is read and written later has been read by then.
CPU paths: `eager_backend.EagerBackend.move_slots` and `native/slots.cpp`. Oracle: `move_slots_oracle`.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from perseid_kernels._triton import cdiv, power_of_two, tl, triton
from perseid_kernels.backend import SlotMoves

_MOST_COLUMNS = 1024


@triton.jit(do_not_specialize=["width"])
def move_slots_kernel(
    caches,  # int64 [C], addresses of [NB · BS, width]
    sources,  # int64 [M]
    targets,  # int64 [M]
    indptr,  # int32 [P+1]
    width,
    WORD: tl.constexpr,  # an integer of the size of the caches' numbers
    BLOCK: tl.constexpr,
):
    path = tl.program_id(0)
    cache = tl.load(caches + tl.program_id(1)).to(tl.pointer_type(WORD))
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    for move in range(tl.load(indptr + path), tl.load(indptr + path + 1)):
        held = tl.load(cache + tl.load(sources + move) * width + column, mask=inside)
        tl.store(cache + tl.load(targets + move) * width + column, held, mask=inside)


def block_of(width: int) -> int:
    """Columns of a program."""
    return min(power_of_two(width), _MOST_COLUMNS)


def move_slots(k_caches: Sequence[Tensor], v_caches: Sequence[Tensor], moves: SlotMoves) -> None:
    """Move in place. Caches are contiguous, of one shape and of 16- or 32-bit numbers."""
    caches = (*k_caches, *v_caches)
    addresses = _table(tuple(cache.data_ptr() for cache in caches), moves.sources.device)
    width = caches[0][0, 0].numel()
    block = block_of(width)
    move_slots_kernel[(moves.indptr.shape[0] - 1, len(caches), cdiv(width, block))](
        addresses,
        moves.sources,
        moves.targets,
        moves.indptr,
        width,
        WORD=tl.int16 if caches[0].dtype.itemsize == 2 else tl.int32,
        BLOCK=block,
        num_warps=4,
        num_stages=1,
    )


@lru_cache(maxsize=8)
def _table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """Of one set of caches: one small upload in a cache's life."""
    return torch.tensor(addresses, device=device)


def move_slots_oracle(cache: Tensor, moves: SlotMoves) -> Tensor:
    """The cache after the moves, one at a time: a new tensor."""
    moved = cache.clone()
    slots = moved.view(-1, *cache.shape[2:])
    for path in range(moves.indptr.numel() - 1):
        for move in range(int(moves.indptr[path]), int(moves.indptr[path + 1])):
            slots[int(moves.targets[move])] = slots[int(moves.sources[move])].clone()
    return moved

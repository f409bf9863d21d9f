"""Trees of drafted rows, in batches with prefills and decodes; and what a tree row stands for, laid out plainly."""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from perseid_kernels.backend import MAX_TREE_ROWS, AttentionBatch, TreeRows
from tests.kernels.cases import DEVICE, attention_batch

Parents = list[int]
"""Of each node of a tree: the row of its parent in the tree. Row 0 is the root; node i has row i + 1."""


@dataclass(frozen=True)
class New:
    """The new rows of a sequence on top of `cached` tokens: plain ones, or a tree's."""

    rows: int | Parents
    cached: int

    @property
    def masks(self) -> list[int]:
        """Ancestor masks; 0 for plain rows."""
        if isinstance(self.rows, int):
            return [0] * self.rows
        masks = [1]
        for node, parent in enumerate(self.rows):
            masks.append(masks[parent] | 1 << node + 1)
        return masks


def random_tree(rng: torch.Generator, num_rows: int) -> Parents:
    """Parents anywhere before their children, so branches lie across one another."""
    return [int(torch.randint(0, row, (1,), generator=rng)) for row in range(1, num_rows)]


def chain(num_rows: int) -> Parents:
    """Every row follows the one before."""
    return list(range(num_rows - 1))


def tree_batch(rng: torch.Generator, news: list[New], block_size: int) -> tuple[AttentionBatch, int]:
    """The batch, and how many blocks its cache has (`attention_batch`)."""
    batch, blocks = attention_batch(rng, [len(new.masks) for new in news], [new.cached for new in news], block_size)
    masks = [mask for new in news for mask in new.masks]
    of_trees = [(row, s) for row, s in enumerate(_sequences(batch)) if masks[row]]
    signed = [mask - (mask >> 63 << 64) for mask in masks]
    rows_R2 = torch.tensor(of_trees, dtype=torch.int32)
    trees = TreeRows(torch.tensor(signed).to(DEVICE), *(part.contiguous().to(DEVICE) for part in rows_R2.T))
    plain = [len(new.masks) for new in news if isinstance(new.rows, int)]
    return replace(batch, max_query_len=max(plain, default=1), trees=trees), blocks


def _sequences(batch: AttentionBatch) -> list[int]:
    """The sequence of each row."""
    return [s for s, (start, end) in enumerate(pairwise(batch.query_start.tolist())) for _ in range(start, end)]


def plain_decode(batch: AttentionBatch, row: int, k: Tensor, v: Tensor) -> tuple[AttentionBatch, tuple[Tensor, Tensor]]:
    """A tree row as the only new row of a sequence that has its ancestors as its last tokens, in blocks of its own."""
    assert batch.trees is not None
    sequence, block_size = _sequences(batch)[row], k.shape[1]
    start, end = batch.query_start[sequence : sequence + 2].tolist()
    prefix = int(batch.context_len[sequence]) - (end - start)
    mask = int(batch.trees.ancestors[row])
    places = [*range(prefix), *(prefix + j for j in range(MAX_TREE_ROWS) if mask >> j & 1)]
    table = batch.block_table[sequence].tolist()
    slots = [table[place // block_size] * block_size + place % block_size for place in places]
    blocks = -(-len(places) // block_size)
    caches = []
    for cache in (k, v):
        own = torch.full((blocks * block_size, *cache.shape[2:]), float("nan"), device=DEVICE)
        own[: len(places)] = cache.flatten(0, 1)[slots]
        caches.append(own.view(blocks, *cache.shape[1:]))
    alone = AttentionBatch(
        query_start=torch.tensor([0, 1], dtype=torch.int32, device=DEVICE),
        context_len=torch.tensor([len(places)], dtype=torch.int32, device=DEVICE),
        block_table=torch.arange(blocks, dtype=torch.int32, device=DEVICE)[None],
        max_query_len=1,
        max_context_len=len(places),
    )
    return alone, (caches[0], caches[1])

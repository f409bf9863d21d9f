"""A tree of drafted tokens that may follow a sequence. Standard library only.

In a batch the sequence's last token is the root and has row 0 of the sequence's rows; node i has row i + 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

ROOT = -1
MAX_TREE_ROWS = 64
"""Rows of a tree, the root among them: an ancestor mask has 64 bits."""


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Node i follows node `parents[i]`, which comes before it, or the root (ROOT). Siblings have different tokens."""

    token_ids: tuple[int, ...]
    parents: tuple[int, ...]
    values: tuple[float, ...]  # estimated probability that the node is accepted, its ancestors included

    def __post_init__(self) -> None:
        if not len(self.token_ids) == len(self.parents) == len(self.values) < MAX_TREE_ROWS:
            raise ValueError(f"a tree has at most {MAX_TREE_ROWS - 1} nodes, each with a parent and a value")
        if any(not ROOT <= parent < node for node, parent in enumerate(self.parents)):
            raise ValueError("every node's parent comes before it")
        if len(set(zip(self.parents, self.token_ids, strict=True))) != len(self.token_ids):
            raise ValueError("siblings have different tokens")

    def __len__(self) -> int:
        """Nodes, the root not counted."""
        return len(self.token_ids)

    @property
    def depths(self) -> tuple[int, ...]:
        """Of each node; the root's children have depth 1."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return tuple(depths)

    def first(self, count: int) -> "DraftTree":
        """The first `count` nodes: a tree again, as parents come before their children."""
        return DraftTree(self.token_ids[:count], self.parents[:count], self.values[:count])

    def children(self, node: int) -> list[int]:
        """Tokens of the children of `node` (or ROOT)."""
        return [token for parent, token in zip(self.parents, self.token_ids, strict=True) if parent == node]

    def child(self, node: int, token_id: int) -> int | None:
        """The child of `node` (or ROOT) that has this token."""
        for place, (parent, token) in enumerate(zip(self.parents, self.token_ids, strict=True)):
            if parent == node and token == token_id:
                return place
        return None


def ancestor_masks(parents: Sequence[int]) -> list[int]:
    """Of each row of a tree, the root first: bit j is set where the row sees row j, which is an ancestor or itself.
    A row has one bit for each token from the root to itself."""
    masks = [1]
    for node, parent in enumerate(parents):
        masks.append(masks[parent + 1] | 1 << (node + 1))
    return masks

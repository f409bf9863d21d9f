"""Which candidates a tree of drafts holds: the most likely ones. Standard library only."""

import heapq
from collections.abc import Iterable, Sequence

Path = tuple[int, ...]
"""A node: the rank of the candidate that each head in turn gives. Its length is its depth; the root is ()."""


def grow(accuracy: Sequence[Sequence[float]], num_nodes: int) -> tuple[Path, ...]:
    """The `num_nodes` nodes with the largest ∏ accuracy[head][rank], or all there are, largest first.

    `accuracy` [head][rank] holds shares from 0 to 1, so no child is likelier than its parent: parents come before
    children, and any first part of the result is the best tree of its size. Ties go to the shorter path, then to the
    lexicographically first.
    """
    nodes: list[Path] = []
    reachable = _children((), 1.0, accuracy)
    heapq.heapify(reachable)
    while reachable and len(nodes) < num_nodes:
        value, _, path = heapq.heappop(reachable)
        nodes.append(path)
        for child in _children(path, -value, accuracy):
            heapq.heappush(reachable, child)
    return tuple(nodes)


def expected_tokens(accuracy: Sequence[Sequence[float]], nodes: Iterable[Path]) -> float:
    """Tokens that a step yields with these nodes: 1 + Σ over nodes of ∏ accuracy[head][rank], the heads being taken as
    independent of each other (Medusa, arXiv:2401.10774, section 2.3.3). Shares of a head's ranks exclude each other."""
    return 1.0 + sum(_value(accuracy, path) for path in nodes)


def _children(path: Path, value: float, accuracy: Sequence[Sequence[float]]) -> list[tuple[float, int, Path]]:
    depth = len(path)
    if depth == len(accuracy):
        return []
    return [(-value * share, depth + 1, (*path, rank)) for rank, share in enumerate(accuracy[depth])]


def _value(accuracy: Sequence[Sequence[float]], path: Path) -> float:
    value = 1.0
    for head, rank in enumerate(path):
        value *= accuracy[head][rank]
    return value

"""From what sources claim to a tree: Medusa candidates grown best first, merged with the chain of prompt lookup.

Standard library only.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from perseid_server.speculation.claims import MEDUSA, NGRAM, Claim
from perseid_server.speculation.ngram import Match, continuation
from perseid_server.speculation.tree import ROOT, DraftTree

LEAST_VALUE = 0.01
"""Nodes below it are not looked at: no step is so cheap that they pay."""

LONGEST_CHAIN = 12
NGRAM_CLAIMS = {6: (0.85, 0.92), 4: (0.75, 0.9), 3: (0.6, 0.85), 2: (0.4, 0.75)}
"""By size of the match: how likely the first token after it is taken to be, and each further one, until claims have
been checked."""
FIRST_CLAIMS = {size: Claim((NGRAM, size, True), first) for size, (first, _) in NGRAM_CLAIMS.items()}
FURTHER_CLAIMS = {size: Claim((NGRAM, size, False), further) for size, (_, further) in NGRAM_CLAIMS.items()}


@dataclass(frozen=True, slots=True)
class Candidates:
    """What Medusa heads say of one sequence: of each head the likeliest tokens, likeliest first."""

    token_ids: Sequence[Sequence[int]]  # [head][rank]
    probabilities: Sequence[Sequence[float]]


Estimate = Callable[[Claim], float]
"""A claim's probability as experience corrects it (`Records.estimate`)."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A tree, and who claimed each of its nodes."""

    tree: DraftTree
    claims: tuple[tuple[Claim, ...], ...]

    def first(self, count: int) -> "Draft":
        """The first `count` nodes."""
        return Draft(self.tree.first(count), self.claims[:count])


@dataclass(slots=True)
class _Node:
    token_id: int
    claims: list[Claim]
    probability: float  # that it comes after its parent
    children: dict[int, "_Node"] = field(default_factory=dict)


class _HeadClaims:
    """What heads claim by rank, with estimates: made when they are looked at, as most of them never are."""

    def __init__(self, candidates: Candidates, estimate: Estimate) -> None:
        self._probabilities = candidates.probabilities
        self._estimate = estimate
        self._made: list[list[tuple[Claim, float]]] = [[] for _ in candidates.probabilities]
        self.num_heads = len(candidates.probabilities)

    def num_ranks(self, head: int) -> int:
        return len(self._probabilities[head])

    def at(self, head: int, rank: int) -> tuple[Claim, float]:
        """A rank is looked at after those before it."""
        made = self._made[head]
        if rank == len(made):
            claim = Claim((MEDUSA, head), self._probabilities[head][rank])
            made.append((claim, self._estimate(claim)))
        return made[rank]


class DraftBuilder:
    """Collects claims about one sequence."""

    def __init__(self, estimate: Estimate, least_value: float = 0.0) -> None:
        """Nodes that are accepted with less than `least_value` are left out."""
        self._estimate = estimate
        self._least = max(least_value, LEAST_VALUE)
        self._roots: dict[int, _Node] = {}

    def add_heads(self, candidates: Candidates, num_nodes: int) -> None:
        """The `num_nodes` likeliest paths through the heads' candidates; a path's probability is the product."""
        claims = _HeadClaims(candidates, self._estimate)
        # (−value, path of ranks): of equal values the shorter path first, so parents come before their children
        heap: list[tuple[float, tuple[int, ...]]] = []

        def found(negated: float, path: tuple[int, ...]) -> None:
            if -negated >= self._least:
                heapq.heappush(heap, (negated, path))

        if claims.num_heads:
            found(-claims.at(0, 0)[1], (0,))
        for _ in range(num_nodes):
            if not heap:
                return
            negated, path = heapq.heappop(heap)
            head, rank = len(path) - 1, path[-1]
            claim, estimate = claims.at(head, rank)
            self._insert([candidates.token_ids[depth][r] for depth, r in enumerate(path)], claim, estimate)
            if head + 1 < claims.num_heads:
                found(negated * claims.at(head + 1, 0)[1], (*path, 0))
            if rank + 1 < claims.num_ranks(head):
                found(negated / estimate * claims.at(head, rank + 1)[1], (*path[:-1], rank + 1))

    def add_match(self, token_ids: Sequence[int], match: Match, num_nodes: int) -> None:
        """What followed an earlier match, as far as it is likely enough."""
        first, further = (
            (claim, self._estimate(claim)) for claim in (FIRST_CLAIMS[match.size], FURTHER_CLAIMS[match.size])
        )
        path: list[int] = []
        value = 1.0
        for token in continuation(token_ids, match, min(num_nodes, LONGEST_CHAIN)):
            claim, estimate = further if path else first
            path.append(token)
            node = self._insert(path, claim, estimate)
            value *= node.probability  # heads may be surer of it
            if value < self._least:
                return

    def build(self, num_nodes: int, max_depth: int) -> Draft | None:
        """The likeliest nodes, parents before children, likeliest first; None if there are none."""
        # ties by order of discovery, which puts parents first: a child is found when its parent is taken
        heap = [(-node.probability, index, ROOT, 1, node) for index, node in enumerate(self._roots.values())]
        heapq.heapify(heap)
        found = len(heap)
        tokens: list[int] = []
        parents: list[int] = []
        values: list[float] = []
        claims: list[tuple[Claim, ...]] = []
        while heap and len(tokens) < num_nodes and -heap[0][0] >= self._least and max_depth > 0:
            negated, _, parent, depth, node = heapq.heappop(heap)
            place = len(tokens)
            tokens.append(node.token_id)
            parents.append(parent)
            values.append(-negated)
            claims.append(tuple(node.claims))
            for child in node.children.values() if depth < max_depth else ():
                heapq.heappush(heap, (negated * child.probability, found, place, depth + 1, child))
                found += 1
        return Draft(DraftTree(tuple(tokens), tuple(parents), tuple(values)), tuple(claims)) if tokens else None

    def _insert(self, path: Sequence[int], claim: Claim, estimate: float) -> _Node:
        """A claim about the last token of a path whose other nodes are there."""
        siblings = self._roots
        for token in path[:-1]:
            siblings = siblings[token].children
        token = path[-1]
        node = siblings.get(token)
        if node is None:
            node = siblings[token] = _Node(token, [claim], estimate)
        else:
            node.claims.append(claim)
            node.probability = max(node.probability, estimate)
        return node

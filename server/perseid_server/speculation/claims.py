"""How likely drafts are, by what has become of those before: estimates, and the record that corrects them.

A *claim* is one source's word for one node: with probability p it is the token that comes after its parent. Of all
claims whose parent was accepted it is known whether they were right; kept by adapter and kind of claim, with what was
claimed, they tell by how much that source is too sure there. Standard library only.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field

MEDUSA, NGRAM = "medusa", "ngram"
"""Sources."""

MEMORY = 400.0
"""Claims after which an old one counts 1/e."""

PRIOR_CLAIMS = 4.0
"""Claimed probability that a new record is taken to have seen come true as claimed."""

MOST_CERTAIN = 0.97
SEQUENCE_PRIOR = 3.0
LEAST_FACTOR, MOST_FACTOR = 0.05, 1.3


@dataclass(frozen=True, slots=True)
class Claim:
    """One source's word for a node."""

    kind: tuple[str, int] | tuple[str, int, bool]  # (MEDUSA, head), or (NGRAM, size of the match, first after it)
    probability: float


@dataclass(slots=True)
class Record:
    """What was claimed, and what came true; old claims fade."""

    claimed: float = PRIOR_CLAIMS
    came_true: float = PRIOR_CLAIMS

    def add(self, probability: float, right: bool, memory: float = MEMORY) -> None:
        """One claim more."""
        fade = 1.0 - 1.0 / memory
        self.claimed = self.claimed * fade + probability
        self.came_true = self.came_true * fade + right

    @property
    def factor(self) -> float:
        """Came true ÷ claimed, within limits: a source that was unlucky gets another chance, one that was lucky no
        free hand."""
        return min(max((self.came_true + 0.1) / (self.claimed + 0.1), LEAST_FACTOR), MOST_FACTOR)


@dataclass(slots=True)
class Records:
    """Of all adapters and kinds of claim."""

    _records: dict[tuple[Hashable, Hashable], Record] = field(default_factory=dict)

    def estimate(self, adapter: Hashable, claim: Claim, of_sequence: float = 1.0) -> float:
        """The claim's probability, corrected by what came of such claims. `of_sequence`: the sequence's own factor."""
        record = self._records.get((adapter, claim.kind))
        factor = 1.0 if record is None else record.factor
        return min(claim.probability * factor * of_sequence, MOST_CERTAIN)

    def add(self, adapter: Hashable, claim: Claim, *, right: bool) -> None:
        """A claim whose parent was accepted has been checked."""
        self._records.setdefault((adapter, claim.kind), Record()).add(claim.probability, right)

    def forget(self, adapter: Hashable) -> None:
        """The adapter is gone."""
        for key in [key for key in self._records if key[0] == adapter]:
            del self._records[key]

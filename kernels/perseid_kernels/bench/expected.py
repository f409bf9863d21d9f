"""Simulated acceptance: what drafts would bring, from published figures, and how many a budget would take.

EXPECTED follows from the top-1 accuracies of 0.56, 0.32, 0.20, 0.15 and 0.12 of the five Medusa heads of a 7B model and
trees that grow by the likeliest node (Medusa, Cai et al., arXiv:2401.10774, section 2.3.3): tokens that a step yields
by the drafted tokens of its tree. The paper measured 2.57 where this says 2.44.
"""

from collections.abc import Mapping
from itertools import pairwise

EXPECTED: Mapping[int, float] = {0: 1.0, 1: 1.56, 3: 1.85, 7: 2.04, 15: 2.21, 31: 2.34, 63: 2.44}
NUM_HEADS = 5

MARGIN = 1.02
"""Drafts have to promise so much more than none: the server's rule (`speculation/budget.py`)."""


def expected_tokens(num_drafts: int) -> float:
    """Of one sequence, a straight line between the table's points. ValueError for more drafts than it tells of."""
    for (fewer, low), (more, high) in pairwise(EXPECTED.items()):
        if fewer <= num_drafts <= more:
            return low + (high - low) * (num_drafts - fewer) / (more - fewer)
    raise ValueError(f"{num_drafts} drafts: the table tells of 0 to {max(EXPECTED)}")


def shares(total: int, parts: int) -> list[int]:
    """As equal as can be: the likeliest nodes of alike sequences, taken in turn."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def tokens_of_step(num_sequences: int, num_rows: int) -> float:
    """Of all sequences, with so many rows together, the sequences' own included."""
    return sum(expected_tokens(rows - 1) for rows in shares(num_rows, num_sequences))


def speed_up(num_sequences: int, num_rows: int, seconds: float, heads: float, plain: float) -> float:
    """Tokens a second of steps that draft, over those of plain steps. Heads run once a step."""
    return tokens_of_step(num_sequences, num_rows) / num_sequences * plain / (seconds + heads)


def chosen_rows(num_sequences: int, measured: Mapping[int, float], heads: float, plain: float) -> int:
    """The number of rows that the server's budget would take of those measured (rows → seconds): most tokens a second,
    and more than without drafts by a margin; `num_sequences`, which is none drafted, where that is not so, and where
    what is won does not pay for the heads, which then rest."""
    best, best_rate = num_sequences, num_sequences / plain * MARGIN
    for rows, seconds in measured.items():
        rate = tokens_of_step(num_sequences, rows) / seconds
        if rows > num_sequences and rate > best_rate:
            best, best_rate = rows, rate
    pays = best > num_sequences and speed_up(num_sequences, best, measured[best], heads, plain) >= 1.0
    return best if pays else num_sequences

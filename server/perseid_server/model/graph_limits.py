"""Which decode steps are recorded: how many rows, how long contexts, how many adapter pages.

Plain steps have a bucket for 1, 2, 4, … rows. Steps with trees begin at 16: up to there products take the same tiles,
so a smaller bucket would save next to nothing. From there on theirs are the row classes of the products (16, 32, 64,
128, …), up to a full batch and the rows of one largest tree (`most_tree_rows`): with more rows than that a GPU computes
where it would else wait for weights, and drafts stop paying. So trees add about half as many recordings as there are
without them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from perseid_kernels.backend import MAX_TREE_ROWS
from perseid_kernels.row_tiles import SMALL_TILE_ROWS

WIDEST_STEP = 64
"""Rows by which buckets grow at most: no more of a step is padding."""

SHORTEST_REACH, REACH_FACTOR = 4096, 8
"""Tokens of context that the first recordings reach, and how much further the next ones do."""


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """What a recorded step has room for."""

    max_rows: int  # sequences decoding at once
    max_context: int  # tokens of one sequence
    block_size: int  # tokens of a KV block
    num_pages: int  # of the adapter pool
    pages_of_row: int  # of the largest adapter
    max_tree_rows: int = 0  # rows of a step with trees; 0: none is recorded

    @property
    def blocks_of_row(self) -> int:
        """Width of the block table."""
        return -(-self.max_context // self.block_size)

    @property
    def most_rows(self) -> int:
        """Rows of any step."""
        return max(self.max_rows, self.max_tree_rows)

    @property
    def buckets(self) -> tuple[int, ...]:
        """Numbers of rows of plain steps that are recorded, ascending."""
        return _doubling(1, self.max_rows)

    @property
    def tree_buckets(self) -> tuple[int, ...]:
        """Numbers of rows of steps with trees that are recorded, ascending."""
        return _doubling(min(SMALL_TILE_ROWS, self.max_tree_rows), self.max_tree_rows) if self.max_tree_rows else ()

    @property
    def reaches(self) -> tuple[int, ...]:
        """Longest contexts that are recorded, ascending."""
        tokens = [min(SHORTEST_REACH, self.max_context)]
        while tokens[-1] < self.max_context:
            tokens.append(min(tokens[-1] * REACH_FACTOR, self.max_context))
        return tuple(tokens)

    def pages_of_step(self, rows: int) -> int:
        """Most pages in the work list of so many rows, a page counted once for each row tile of its adapter.

        Each row has a tile of its own at most; and whole tiles have 16 rows, so beyond the first of each adapter
        there are rows / 16 of them, with `pages_of_row` pages or less.
        """
        shared = self.num_pages + -(-rows // SMALL_TILE_ROWS) * self.pages_of_row
        return min(rows * self.pages_of_row, shared)


def most_tree_rows(max_sequences: int, max_batch_tokens: int) -> int:
    """Rows of the largest step with trees that is worth a recording, where the scheduler allows so many."""
    return min(max_sequences * MAX_TREE_ROWS, max_sequences + MAX_TREE_ROWS, max_batch_tokens)


def first_that_holds(sizes: Iterable[int], value: int) -> int:
    """The smallest of ascending sizes that is no less."""
    return next(size for size in sizes if size >= value)


def _doubling(first: int, last: int) -> tuple[int, ...]:
    sizes = [first]
    while sizes[-1] < last:
        sizes.append(min(2 * sizes[-1], sizes[-1] + WIDEST_STEP, last))
    return tuple(sizes)

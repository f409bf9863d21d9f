"""How a step is laid into the inputs of a recording: what of it is read, and what pads it."""

import torch

from perseid_kernels.backend import MAX_TREE_ROWS
from perseid_server.model.batch import HostBatch
from perseid_server.model.graph_limits import GraphLimits
from perseid_server.model.step_inputs import StepInputs
from perseid_server.speculation.tree import ancestor_masks
from tests.server.model.passes import CPU

LIMITS = GraphLimits(max_rows=4, max_context=64, block_size=16, num_pages=1, pages_of_row=1, max_tree_rows=68)


def batch_of(rows_of_sequence: list[int], ancestors: list[int], seed: int = 0) -> HostBatch:
    """Sequences with so many new rows behind 10 tokens; other numbers with another seed."""
    starts = [0]
    for rows in rows_of_sequence:
        starts.append(starts[-1] + rows)
    return HostBatch(
        token_ids=[seed + row for row in range(starts[-1])],
        positions=[10] * starts[-1],
        slots=[seed + row for row in range(starts[-1])],
        query_start=starts,
        context_len=[10 + rows for rows in rows_of_sequence],
        blocks=[[seed + place] for place in range(len(rows_of_sequence))],
        pages=[None] * starts[-1],
        logits_rows=range(starts[-1]),
        ancestors=ancestors,
    )


def test_every_row_is_one_of_a_tree_and_padding_belongs_to_a_sequence_without_rows() -> None:
    """After a larger step: nothing of it is left where anybody reads."""
    inputs = StepInputs(LIMITS, 8, True, *StepInputs.allocate(LIMITS, CPU))
    read = inputs.batch(None, 64)
    inputs.fill(batch_of([3, 5], [1, 3, 5, 1, 3, 7, 11, 21], seed=9))
    inputs.fill(batch_of([1, 3, 1], [0, 0b1, 0b11, 0b101, 0]))
    trees = read.attention.trees
    assert trees is not None
    assert trees.ancestors.tolist() == [1, 1, 3, 5, 1, 0, 0, 0]
    assert trees.rows.tolist() == list(range(8))
    assert trees.sequences.tolist() == [0, 1, 1, 1, 2, 3, 3, 3]
    assert read.attention.query_start.tolist() == [0, 1, 4, 5, 5, 5, 5, 5, 5]
    assert read.attention.context_len.tolist() == [11, 13, 11, 0, 0, 0, 0, 0]
    assert read.attention.block_table[:3, 0].tolist() == [0, 1, 2]
    assert read.slots_T.tolist() == [0, 1, 2, 3, 4, -1, -1, -1]
    assert read.token_ids_T.tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
    assert (read.attention.max_query_len, read.attention.max_context_len) == (1, 64)


def test_a_tree_of_64_rows_fits() -> None:
    """The last bit is the sign."""
    inputs = StepInputs(LIMITS, 68, True, *StepInputs.allocate(LIMITS, CPU))
    read = inputs.batch(None, 64)
    inputs.fill(batch_of([MAX_TREE_ROWS], ancestor_masks(range(-1, MAX_TREE_ROWS - 2))))
    trees = read.attention.trees
    assert trees is not None
    assert trees.ancestors[62:65].tolist() == [(1 << 63) - 1, -1, 0]


def test_plain_steps_and_steps_with_trees_share_one_buffer() -> None:
    buffer, numbers = StepInputs.allocate(LIMITS, CPU)
    plain, trees = (StepInputs(LIMITS, 4, with_trees, buffer, numbers) for with_trees in (False, True))
    assert plain.batch(None, 64).attention.trees is None
    plain.fill(batch_of([1, 1], [], seed=5))
    assert trees.batch(None, 64).token_ids_T.tolist() == [5, 6, 0, 0]
    assert torch.equal(trees.batch(None, 64).attention.block_table[:2, 0], torch.tensor([5, 6], dtype=torch.int32))


def test_a_step_of_lone_roots_needs_no_masks() -> None:
    inputs = StepInputs(LIMITS, 3, True, *StepInputs.allocate(LIMITS, CPU))
    inputs.fill(batch_of([1, 1], []))
    trees = inputs.batch(None, 64).attention.trees
    assert trees is not None
    assert trees.ancestors.tolist() == [1, 1, 0]

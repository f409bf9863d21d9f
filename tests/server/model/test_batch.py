"""What a step's rows become: trees, and the moves of their accepted slots."""

from dataclasses import replace

import pytest
import torch

from perseid_kernels.backend import MAX_TREE_ROWS
from perseid_server.model.batch import HostBatch, slot_moves
from perseid_server.speculation.tree import ancestor_masks
from tests.server.model.passes import CPU


def host_batch(rows_of_sequence: list[int], ancestors: list[int]) -> HostBatch:
    """Sequences with so many new rows and nothing before them."""
    starts = [0]
    for rows in rows_of_sequence:
        starts.append(starts[-1] + rows)
    total = starts[-1]
    return HostBatch(
        token_ids=[0] * total,
        positions=[0] * total,
        slots=range(total),
        query_start=starts,
        context_len=rows_of_sequence,
        blocks=[[0]] * len(rows_of_sequence),
        pages=[None] * total,
        logits_rows=range(total),
        ancestors=ancestors,
    )


def test_rows_of_trees_and_their_sequences_are_found() -> None:
    """A chunk, a tree, a decode, a tree of its root alone."""
    batch = host_batch([2, 3, 1, 1], [0, 0, 0b001, 0b011, 0b101, 0, 0b1]).on(CPU).attention
    assert batch.trees is not None
    assert batch.trees.ancestors.tolist() == [0, 0, 1, 3, 5, 0, 1]
    assert batch.trees.rows.tolist() == [2, 3, 4, 6]
    assert batch.trees.sequences.tolist() == [1, 1, 1, 3]
    assert batch.max_query_len == 2  # of what is no tree
    assert [t.dtype for t in (batch.trees.ancestors, batch.trees.rows)] == [torch.int64, torch.int32]


@pytest.mark.parametrize("ancestors", [[], [0, 0, 0]])
def test_without_a_tree_there_are_no_tree_rows(ancestors: list[int]) -> None:
    batch = host_batch([2, 1], ancestors).on(CPU).attention
    assert batch.trees is None
    assert batch.max_query_len == 2


def test_the_last_bit_is_the_sign() -> None:
    """A chain of all 64 rows: the last one sees all of them."""
    masks = ancestor_masks(range(-1, MAX_TREE_ROWS - 2))
    batch = host_batch([MAX_TREE_ROWS], masks).on(CPU).attention
    assert batch.trees is not None
    assert batch.trees.ancestors[-2:].tolist() == [(1 << 63) - 1, -1]
    assert batch.max_query_len == 1


def test_decodes_and_trees_make_a_step_with_trees() -> None:
    assert host_batch([1, 3], [0, 1, 3, 5]).is_tree_step
    assert host_batch([1, 1], []).is_tree_step, "a decode is one too"
    assert not host_batch([2, 3], [0, 0, 1, 3, 5]).is_tree_step, "a chunk beside a tree"
    assert not host_batch([2], []).is_tree_step
    assert not replace(host_batch([1, 3], [0, 1, 3, 5]), logits_rows=[0, 3]).is_tree_step


def test_a_root_alone_is_a_decode() -> None:
    assert host_batch([1, 1], [1, 0]).is_decode
    assert not host_batch([2, 1], [1, 3, 0]).is_decode


def test_moves_of_paths_are_laid_side_by_side() -> None:
    """What lies where it belongs is left out, and so is a path that has nothing to move."""
    moves = slot_moves([[(16, 16), (19, 17), (3, 18)], [(40, 40)], [], [(52, 51)]], CPU)
    assert moves is not None
    assert moves.sources.tolist() == [19, 3, 52]
    assert moves.targets.tolist() == [17, 18, 51]
    assert moves.indptr.tolist() == [0, 2, 3]
    assert moves.indptr.dtype == torch.int32


def test_nothing_to_move() -> None:
    assert slot_moves([], CPU) is None
    assert slot_moves([[(5, 5)], []], CPU) is None

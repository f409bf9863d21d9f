"""Which steps are measured when the server starts, and by which way they run."""

from typing import Any, cast

import torch

from perseid_kernels.fused import Outputs
from perseid_server.model import step_times
from perseid_server.model.batch import HostBatch, StepBatch
from perseid_server.model.decode_graphs import DecodeGraphs
from perseid_server.model.graph_limits import GraphLimits
from perseid_server.model.step_times import REPEATS, ROWS, measure_steps
from tests.server.model.passes import CPU

LIMITS = GraphLimits(4, 600, block_size=16, num_pages=1, pages_of_row=1, max_tree_rows=68)
TIMES = 1 + REPEATS


def outputs(rows: int) -> Outputs:
    return Outputs(torch.zeros(rows, 2), torch.zeros(rows, 3))


class Ordinary:
    """Stands for the decoder; keeps what it ran."""

    def __init__(self) -> None:
        self.batches: list[StepBatch] = []

    def __call__(self, batch: StepBatch) -> Outputs:
        self.batches.append(batch)
        return outputs(len(batch.logits_rows))

    @property
    def rows(self) -> list[int]:
        return [len(batch.token_ids_T) for batch in self.batches[::TIMES]]


class FakeGraphs:
    """Takes what the real ones do; keeps it."""

    takes = DecodeGraphs.takes

    def __init__(self, limits: GraphLimits) -> None:
        self._limits = self.limits = limits
        self.batches: list[HostBatch] = []

    def forward(self, batch: HostBatch) -> Outputs:
        self.batches.append(batch)
        return outputs(len(batch.token_ids))


def measured(limits: GraphLimits) -> tuple[step_times.StepTimes, Ordinary, FakeGraphs]:
    ordinary, graphs = Ordinary(), FakeGraphs(limits)
    return measure_steps(ordinary, CPU, 1000, 16, cast("DecodeGraphs", graphs)), ordinary, graphs


def test_without_recordings_a_row_is_a_row() -> None:
    ordinary = Ordinary()
    times = measure_steps(ordinary, CPU, 20, 16)
    assert times.plain == times.trees
    assert list(times.plain) == sorted(ordinary.rows) == [rows for rows in ROWS if rows <= 20]
    assert ordinary.rows[:2] == [1, 16], "far enough from each other to tell a slope"
    assert all(seconds > 0 for seconds in times.plain.values())
    assert ordinary.batches[-1].slots_T.tolist() == list(range(12)), "as any prompt is stored"


def test_recorded_steps_are_measured_by_replaying_them() -> None:
    """Both ends of every bucket; what is larger than any runs as it would."""
    times, ordinary, graphs = measured(LIMITS)
    replayed = graphs.batches[::TIMES]
    plain, trees = [1, 2, 3, 4], [2, 16, 17, 32, 33, 64, 65, 68]
    assert [len(batch.token_ids) for batch in replayed] == [*plain, *trees]
    assert [batch.is_decode for batch in replayed] == [True] * len(plain) + [False] * len(trees)
    assert list(times.plain) == [*plain, 5, 8]
    assert list(times.trees) == [*trees, 69, 136]
    assert ordinary.rows == [8, 5, 69, 136], "a far point comes early"
    assert [batch.attention.trees is None for batch in ordinary.batches[::TIMES]] == [True, True, False, False]


def test_trees_are_as_few_as_hold_the_rows_and_nothing_is_stored() -> None:
    _, ordinary, graphs = measured(LIMITS)
    assert [list(batch.context_len) for batch in graphs.batches[-2 * TIMES :: TIMES]] == [[33, 32], [34, 34]]
    assert all(set(batch.slots) == {-1} for batch in graphs.batches)
    assert all((batch.slots_T == -1).all() for batch in ordinary.batches)


def test_without_recorded_trees_plain_steps_tell() -> None:
    times, _, _ = measured(GraphLimits(4, 600, 16, 1, 1))
    assert times.trees == times.plain
    assert list(times.plain) == [1, 2, 3, 4, 5, 8]


def test_contexts_that_hold_no_large_tree_hold_small_ones() -> None:
    _, _, graphs = measured(GraphLimits(4, 10, 16, 1, 1, max_tree_rows=20))
    assert max(max(batch.context_len) for batch in graphs.batches) == 10
    assert len(graphs.batches[-1].token_ids) == 20


def test_a_slow_machine_measures_less(monkeypatch: Any) -> None:
    monkeypatch.setattr(step_times, "LONGEST_S", 0.0)
    times, _, _ = measured(LIMITS)
    assert list(times.plain) == [1, 8]
    assert list(times.trees) == [2, 16]

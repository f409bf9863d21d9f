"""What a step takes by its number of rows, measured when the server starts: what the draft budget begins with.

Where steps are recorded, each kind is measured as it is going to run: the first and the last size of every bucket, and
beyond the largest one the ordinary way, which there is what larger steps have left. Elsewhere a row takes what it takes
whatever it belongs to, and one curve serves plain steps and steps with trees.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from perseid_kernels.backend import MAX_TREE_ROWS
from perseid_kernels.fused import Outputs
from perseid_server.model.batch import HostBatch, StepBatch
from perseid_server.model.decode_graphs import DecodeGraphs
from perseid_server.model.graph_limits import GraphLimits

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
REPEATS = 3
LONGEST_S = 2.0
"""What measuring a curve may take. Where it is over, more rows are taken to go on as the last ones do."""

FAR_ROWS = 16
"""After one row so many are measured, however long it takes: two points beside each other tell no slope."""

Forward = Callable[[StepBatch], Outputs]


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds by rows, the fastest of some runs."""

    plain: Mapping[int, float]
    trees: Mapping[int, float]


def measure_steps(
    forward: Forward, device: torch.device, num_slots: int, block_size: int, graphs: DecodeGraphs | None = None
) -> StepTimes:
    """Times of both kinds of steps. Without `graphs`, writes into the cache's first slots: nobody may hold them yet."""

    def ordinary(batch: HostBatch) -> Outputs:
        return forward(batch.on(device))

    if graphs is None:
        rows = [count for count in ROWS if count <= num_slots]
        chunks = _measure(ordinary, {count: _chunk(count, block_size, stored=True) for count in rows})
        return StepTimes(chunks, chunks)

    def replayed(batch: HostBatch) -> Outputs:
        return graphs.forward(batch) if graphs.takes(batch) else ordinary(batch)

    plain = _measure(replayed, _plain_steps(graphs.limits))
    return StepTimes(plain, _measure(replayed, _tree_steps(graphs.limits)) if graphs.limits.max_tree_rows else plain)


def _measure(forward: Callable[[HostBatch], Outputs], batches: Mapping[int, HostBatch]) -> Mapping[int, float]:
    started = time.perf_counter()
    measured: dict[int, float] = {}
    far = max((rows for rows in batches if rows <= FAR_ROWS), default=0)
    order = sorted(batches, key=lambda rows: (rows != min(batches), rows != far, rows))
    for rows in order:
        batch = batches[rows]
        if len(measured) > 1 and time.perf_counter() - started > LONGEST_S:
            break
        _run(forward, batch)  # compiles, and touches memory
        measured[rows] = min(_run(forward, batch) for _ in range(REPEATS))
    return dict(sorted(measured.items()))


def _run(forward: Callable[[HostBatch], Outputs], batch: HostBatch) -> float:
    started = time.perf_counter()
    outputs = forward(batch)
    outputs.logits_LV[0, :1].cpu()  # waits for the device
    return time.perf_counter() - started


def _plain_steps(limits: GraphLimits) -> dict[int, HostBatch]:
    """Decodes; and chunks, as more rows than these are none but with a prompt's."""
    decodes = {rows: _trees([1] * rows, limits.block_size) for rows in _edges((0, *limits.buckets))}
    beyond = (limits.max_rows + 1, 2 * limits.max_rows)
    return decodes | {rows: _chunk(rows, limits.block_size, stored=False) for rows in beyond}


def _tree_steps(limits: GraphLimits) -> dict[int, HostBatch]:
    """As few trees as hold the rows."""
    most = min(MAX_TREE_ROWS, limits.max_context)
    beyond = (limits.max_tree_rows + 1, 2 * limits.max_tree_rows)
    sizes = [rows for rows in (*_edges((1, *limits.tree_buckets)), *beyond) if rows > 1]
    return {rows: _trees(_shares(rows, -(-rows // most)), limits.block_size) for rows in sizes}


def _edges(buckets: Sequence[int]) -> Iterable[int]:
    """The first and the last number of rows of each bucket, ascending; `buckets` begins with what comes before."""
    return dict.fromkeys(rows for before, bucket in pairwise(buckets) for rows in (before + 1, bucket))


def _shares(total: int, parts: int) -> list[int]:
    return [total // parts + (part < total % parts) for part in range(parts)]


def _chunk(rows: int, block_size: int, *, stored: bool) -> HostBatch:
    """Rows of a sequence's beginning, of which all logits are wanted. All at position 0, as there may be no others."""
    num_blocks = -(-rows // block_size)
    return HostBatch(
        token_ids=[0] * rows,
        positions=[0] * rows,
        slots=list(range(rows)) if stored else [-1] * rows,
        query_start=[0, rows],
        context_len=[rows],
        blocks=[list(range(num_blocks)) if stored else [0] * num_blocks],
        pages=[None] * rows,
        logits_rows=list(range(rows)),
    )


def _trees(sizes: Sequence[int], block_size: int) -> HostBatch:
    """Beginnings of sequences, each a root with its children: so many rows each, which are stored nowhere. They read
    block 0, whatever that holds."""
    rows = sum(sizes)
    return HostBatch(
        token_ids=[0] * rows,
        positions=[0] * rows,
        slots=[-1] * rows,
        query_start=[0, *accumulate(sizes)],
        context_len=list(sizes),
        blocks=[[0] * -(-size // block_size) for size in sizes],
        pages=[None] * rows,
        logits_rows=list(range(rows)),
        ancestors=[1 | 1 << row for size in sizes for row in range(size)],
    )

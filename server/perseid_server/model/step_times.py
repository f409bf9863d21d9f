"""What a step takes by its number of rows, measured when the server starts: what the draft budget begins with."""

import time
from collections.abc import Callable, Mapping

import torch

from perseid_kernels.fused import Outputs
from perseid_server.model.batch import HostBatch, StepBatch

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
REPEATS = 3
LONGEST_S = 2.0
"""What measuring may take. Where it is over, more rows are taken to go on as the last ones do."""


def measure_steps(
    forward: Callable[[StepBatch], Outputs], device: torch.device, num_slots: int, block_size: int
) -> Mapping[int, float]:
    """Seconds by rows, the fastest of some runs. Writes into the cache's first slots: nobody may hold them yet."""
    started = time.perf_counter()
    measured: dict[int, float] = {}
    for rows in ROWS:
        if rows > num_slots or (len(measured) > 1 and time.perf_counter() - started > LONGEST_S):
            break
        batch = _rows(rows, block_size)
        _run(forward, batch, device)  # compiles, and touches memory
        measured[rows] = min(_run(forward, batch, device) for _ in range(REPEATS))
    return measured


def _run(forward: Callable[[StepBatch], Outputs], batch: HostBatch, device: torch.device) -> float:
    started = time.perf_counter()
    outputs = forward(batch.on(device))
    outputs.logits_LV[0, :1].cpu()  # waits for the device
    return time.perf_counter() - started


def _rows(rows: int, block_size: int) -> HostBatch:
    """The beginning of a sequence, of which the logits of every row are wanted."""
    return HostBatch(
        token_ids=[0] * rows,
        positions=list(range(rows)),
        slots=list(range(rows)),
        query_start=[0, rows],
        context_len=[rows],
        blocks=[list(range(-(-rows // block_size)))],
        pages=[None] * rows,
        logits_rows=list(range(rows)),
    )

"""What a recorded step reads: its inputs at fixed addresses, and how a step gets there.

Rows that fill a bucket up are padding: their slot is −1 (stored nowhere), their sequences have no row (attention skips
them) and they are in no segment. What they compute is never looked at.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from perseid_kernels.backend import AttentionBatch, TreeRows
from perseid_kernels.row_tiles import StaticSegments
from perseid_kernels.upload import Layout, staging
from perseid_server.model.batch import HostBatch, StepBatch
from perseid_server.model.graph_limits import GraphLimits

_LONE_ROOT = 1
"""The ancestor mask of a row that sees its prefix and itself."""


class _Fields(NamedTuple):
    """The arrays of the buffer, for M rows of M sequences or less."""

    token_ids: Tensor  # int64 [M]
    positions: Tensor  # int64 [M]
    slots: Tensor  # int64 [M]
    ancestors: Tensor  # int64 [M], read by steps with trees, as are:
    sequences: Tensor  # int32 [M], of each row
    query_start: Tensor  # int32 [M+1]
    context_len: Tensor  # int32 [M]
    block_table: Tensor  # int32 [S, blocks]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The inputs of `rows` rows, in a buffer that all buckets share.

    With `trees`, each row is one of a tree, and a sequence that decodes without drafts is a tree of its root, which
    attention gives the bits of a decode. Then there are as many sequences as rows at most; those that a step has not
    are padding like its missing rows, and they are what padding rows belong to.
    """

    limits: GraphLimits
    rows: int
    trees: bool
    buffer: Tensor  # uint8
    row_numbers: Tensor  # int32 [M], 0, 1, 2, …

    @staticmethod
    def allocate(limits: GraphLimits, device: torch.device) -> tuple[Tensor, Tensor]:
        """`buffer` and `row_numbers`, for steps of any size."""
        size = _layout(limits, limits.most_rows).nbytes
        buffer = torch.zeros(size, dtype=torch.uint8, device=device)
        return buffer, torch.arange(limits.most_rows, dtype=torch.int32, device=device)

    def batch(self, segments: StaticSegments | None, reach: int) -> StepBatch:
        """The inputs as the decoder takes them; attention is told that no context is longer than `reach`."""
        rows, fields = self.rows, self._fields(self.buffer, self.rows)
        trees = TreeRows(fields.ancestors[:rows], self.row_numbers[:rows], fields.sequences[:rows])
        return StepBatch(
            token_ids_T=fields.token_ids[:rows],
            positions_T=fields.positions[:rows],
            slots_T=fields.slots[:rows],
            attention=AttentionBatch(
                query_start=fields.query_start[: rows + 1],
                context_len=fields.context_len[:rows],
                block_table=fields.block_table,
                max_query_len=1,
                max_context_len=reach,
                trees=trees if self.trees else None,
            ),
            segments=segments,
            logits_rows=torch.arange(rows, device=self.buffer.device),
        )

    def fill(self, batch: HostBatch) -> None:
        """Copy a step in, padding behind it: one copy, which does not wait for the device and ends with the blocks of
        the step's last sequence."""
        num_sequences = len(batch.context_len)
        host = staging(_layout(self.limits, num_sequences).nbytes, self.buffer.device)
        fields = self._fields(host, num_sequences)
        _put(fields.token_ids, batch.token_ids, padding=0)
        _put(fields.positions, batch.positions, padding=0)
        _put(fields.slots, batch.slots, padding=-1)
        _put(fields.query_start, batch.query_start, padding=len(batch.token_ids))
        _put(fields.context_len, batch.context_len, padding=0)
        if self.trees:
            masks = np.array(batch.ancestors or [0] * len(batch.token_ids), dtype=np.uint64)
            _put(fields.ancestors, np.where(masks == 0, _LONE_ROOT, masks).astype(np.uint64).view(np.int64), padding=0)
            _put(fields.sequences, np.repeat(np.arange(num_sequences), np.diff(batch.query_start)), num_sequences)
        for row, blocks in zip(fields.block_table.numpy(), batch.blocks, strict=True):
            row[: len(blocks)] = blocks  # what lies behind the context is not read, whatever it is
        self.buffer[: host.numel()].copy_(host, non_blocking=True)

    def _fields(self, buffer: Tensor, num_sequences: int) -> _Fields:
        return _Fields(*_layout(self.limits, num_sequences).views(buffer))


def _layout(limits: GraphLimits, num_sequences: int) -> Layout:
    """The block table is last: it may end with the sequences there are, and all else lies where it lies for every
    bucket."""
    most = limits.most_rows
    longs, ints = (torch.int64, (most,)), (torch.int32, (most,))
    table = (torch.int32, (num_sequences, limits.blocks_of_row))
    return Layout((longs, longs, longs, longs, ints, (torch.int32, (most + 1,)), ints, table))


def _put(target: Tensor, values: Sequence[int] | np.ndarray, padding: int) -> None:
    array = target.numpy()
    array[: len(values)] = values
    array[len(values) :] = padding

"""Decode steps that are recorded once and replayed: on a GPU one launch in place of some hundred.

A recording has fixed shapes and addresses. So there is one for every *row bucket* (1, 2, 4, … rows) with adapters and
one without, all on the same step inputs: a step is copied into them, the recording of the smallest bucket that holds
its rows is replayed, and hidden states and logits lie where that one leaves them. How long contexts are and which pages
a row uses stands in the inputs, so a recording serves every step of its bucket. Attention's grid is that of the longest
context there may be; where that is long, more recordings with a shorter *reach* spare short contexts most of the grid.

Rows that fill a bucket up are padding: their slot is −1 (stored nowhere), their sequences have no row (attention skips
them) and they are in no segment. What they compute is never looked at.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from perseid_kernels.backend import AttentionBatch, Recorder
from perseid_kernels.fused import Outputs
from perseid_kernels.row_tiles import SMALL_TILE_ROWS, StaticSegments
from perseid_kernels.segments import PageList
from perseid_kernels.upload import Layout, staging
from perseid_server.model.batch import HostBatch, StepBatch
from perseid_server.model.decoder import AdapterPools, Decoder
from perseid_server.model.kv_cache import KVCache

logger = logging.getLogger(__name__)

MIB = 1 << 20
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

    @property
    def blocks_of_row(self) -> int:
        """Width of the block table."""
        return -(-self.max_context // self.block_size)

    @property
    def buckets(self) -> tuple[int, ...]:
        """Numbers of rows that are recorded, ascending."""
        sizes = [1]
        while sizes[-1] < self.max_rows:
            sizes.append(min(2 * sizes[-1], sizes[-1] + WIDEST_STEP, self.max_rows))
        return tuple(sizes)

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


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The inputs of `rows` rows at fixed addresses, in a buffer that all buckets share."""

    limits: GraphLimits
    rows: int
    buffer: Tensor  # uint8

    @staticmethod
    def layout(limits: GraphLimits, rows: int) -> Layout:
        """The block table is last: a bucket's copy ends with the rows it has, and all else lies where it lies for
        every bucket."""
        most = limits.max_rows
        longs = (torch.int64, (most,))  # token ids, positions, slots
        starts, contexts = (torch.int32, (most + 1,)), (torch.int32, (most,))
        return Layout((longs, longs, longs, starts, contexts, (torch.int32, (rows, limits.blocks_of_row))))

    def batch(self, segments: StaticSegments | None, reach: int) -> StepBatch:
        """The inputs as the decoder takes them; attention is told that no context is longer than `reach`."""
        rows = self.rows
        token_ids, positions, slots, query_start, context_len, block_table = self._views(self.buffer)
        return StepBatch(
            token_ids_T=token_ids[:rows],
            positions_T=positions[:rows],
            slots_T=slots[:rows],
            attention=AttentionBatch(
                query_start=query_start[: rows + 1],
                context_len=context_len[:rows],
                block_table=block_table,
                max_query_len=1,
                max_context_len=reach,
            ),
            segments=segments,
            logits_rows=torch.arange(rows, device=self.buffer.device),
        )

    def fill(self, batch: HostBatch) -> None:
        """Copy a step in, padding behind it: one copy, which does not wait for the device."""
        host = staging(self.layout(self.limits, self.rows).nbytes, self.buffer.device)
        token_ids, positions, slots, query_start, context_len, block_table = self._views(host)
        _put(token_ids, batch.token_ids, padding=0)
        _put(positions, batch.positions, padding=0)
        _put(slots, batch.slots, padding=-1)
        _put(query_start, batch.query_start, padding=len(batch.token_ids))
        _put(context_len, batch.context_len, padding=0)
        for row, blocks in zip(block_table.numpy(), batch.blocks, strict=False):
            row[: len(blocks)] = blocks  # what lies behind the context is not read, whatever it is
        self.buffer[: host.numel()].copy_(host, non_blocking=True)

    def _views(self, buffer: Tensor) -> tuple[Tensor, ...]:
        return self.layout(self.limits, self.rows).views(buffer)


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """A bucket's step of one family."""

    inputs: StepInputs
    segments: StaticSegments | None
    outputs: Outputs
    replay: Callable[[], None]

    def run(self, batch: HostBatch) -> Outputs:
        """Of the batch's rows."""
        self.inputs.fill(batch)
        if self.segments is not None:
            self.segments.fill(batch.pages)
        self.replay()
        return _first(self.outputs, len(batch.token_ids))


class DecodeGraphs:
    """The recorded steps of one decoder, KV cache and adapter pool."""

    def __init__(
        self, decoder: Decoder, kv: KVCache, pools: AdapterPools, recorder: Recorder, limits: GraphLimits
    ) -> None:
        """Record everything, which runs every step once, on padding."""
        started, free = time.perf_counter(), _free_memory(decoder.device)
        self._limits = limits
        recording = _Recording(decoder, kv, pools, recorder, limits)
        # The largest first: the others find all their memory in the pool.
        sizes = product(reversed(limits.buckets), reversed(limits.reaches), (True, False))
        self._steps = {size: recording.step(*size) for size in sizes}
        logger.info(
            "recorded %d decode steps of up to %d rows in %.1f s; they take %.0f MiB",
            len(self._steps),
            limits.max_rows,
            time.perf_counter() - started,
            (free - _free_memory(decoder.device)) / MIB,
        )

    def takes(self, batch: HostBatch) -> bool:
        """Whether the batch is a pure decode step that a recording has room for."""
        rows = len(batch.token_ids)
        return (
            batch.is_decode
            and not batch.routed  # gates come and go, a recording holds addresses
            and rows <= self._limits.max_rows
            and max(batch.context_len) <= self._limits.max_context
            and max(len(blocks) for blocks in batch.blocks) <= self._limits.blocks_of_row
            and _pages_of(batch.pages) <= self._limits.pages_of_step(rows)
        )

    @torch.inference_mode()
    def forward(self, batch: HostBatch) -> Outputs:
        """Of all rows of a batch that `takes` accepts. They hold until the next call."""
        rows = next(size for size in self._limits.buckets if size >= len(batch.token_ids))
        reach = next(size for size in self._limits.reaches if size >= max(batch.context_len))
        adapted = any(pages is not None for pages in batch.pages)
        return self._steps[rows, reach, adapted].run(batch)


class _Recording:
    """Records steps that share their inputs, their outputs and, for what is between, their memory."""

    def __init__(
        self, decoder: Decoder, kv: KVCache, pools: AdapterPools, recorder: Recorder, limits: GraphLimits
    ) -> None:
        self._decoder, self._kv, self._pools = decoder, kv, pools
        self._recorder = recorder
        self._limits = limits
        self._pool = recorder.new_pool()
        device, size = decoder.device, StepInputs.layout(limits, limits.max_rows).nbytes
        self._buffer = torch.zeros(size, dtype=torch.uint8, device=device)
        config, dtype = decoder.config, decoder.backend.compute_dtype
        self._outputs = Outputs(
            hidden_LE=torch.empty((limits.max_rows, config.hidden_size), dtype=dtype, device=device),
            logits_LV=torch.empty((limits.max_rows, config.vocab_size), dtype=torch.float32, device=device),
        )

    @torch.inference_mode()
    def step(self, rows: int, reach: int, adapted: bool) -> RecordedStep:
        inputs = StepInputs(self._limits, rows, self._buffer)
        segments = None
        if adapted:
            segments = StaticSegments.allocate(rows, self._limits.pages_of_step(rows), self._buffer.device)
        batch, outputs = inputs.batch(segments, reach), _first(self._outputs, rows)

        def run() -> None:
            hidden_TE = self._decoder.hidden(batch, self._kv, self._pools)
            outputs.hidden_LE.copy_(hidden_TE)
            outputs.logits_LV.copy_(self._decoder.logits(hidden_TE))

        inputs.fill(_NO_ROWS)
        return RecordedStep(inputs, segments, outputs, self._recorder.record(run, self._pool))


_NO_ROWS = HostBatch((), (), (), (0,), (), (), (), ())


def _first(outputs: Outputs, rows: int) -> Outputs:
    return Outputs(outputs.hidden_LE[:rows], outputs.logits_LV[:rows])


def _put(target: Tensor, values: Sequence[int], padding: int) -> None:
    array = target.numpy()
    array[: len(values)] = values
    array[len(values) :] = padding


def _pages_of(lists: Sequence[PageList | None]) -> int:
    """Pages of the work list: those of a segment, once for each of its row tiles."""
    rows_of = Counter(pages for pages in lists if pages is not None)
    return sum(len(pages.pages) * -(-rows // SMALL_TILE_ROWS) for pages, rows in rows_of.items())


def _free_memory(device: torch.device) -> int:
    """Free device bytes; 0 on a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0

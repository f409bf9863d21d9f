"""Decode steps that are recorded once and replayed: on a GPU one launch in place of some hundred.

A recording has fixed shapes and addresses. So there is one for every *row bucket* (1, 2, 4, … rows) with adapters and
one without, all on the same step inputs: a step is copied into them, the recording of the smallest bucket that holds
its rows is replayed, and hidden states and logits lie where that one leaves them. How long contexts are and which pages
a row uses stands in the inputs, so a recording serves every step of its bucket. Attention's grid is that of the longest
context there may be; where that is long, more recordings with a shorter *reach* spare short contexts most of the grid.

Steps in which some sequences have drafted trees are recorded apart, in buckets of rows: there attention finds each
row's sequence and ancestors in the inputs. Which sizes are worth a recording: `graph_limits`. What is made of the
logits, and the moves of accepted drafts, stay outside.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch

from perseid_kernels.backend import Recorder
from perseid_kernels.fused import Outputs
from perseid_kernels.row_tiles import SMALL_TILE_ROWS, StaticSegments
from perseid_kernels.segments import PageList
from perseid_server.model.batch import HostBatch
from perseid_server.model.decoder import AdapterPools, Decoder
from perseid_server.model.graph_limits import GraphLimits, first_that_holds
from perseid_server.model.kv_cache import KVCache
from perseid_server.model.step_inputs import StepInputs

logger = logging.getLogger(__name__)

MIB = 1 << 20


class StepSize(NamedTuple):
    """What a recording is for."""

    rows: int
    reach: int  # tokens of the longest context
    adapted: bool  # some row uses adapters
    trees: bool  # some sequence has more rows than one


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
        self._steps = {size: recording.step(size) for size in _sizes(limits)}
        logger.info(
            "recorded %d decode steps of up to %d rows in %.1f s; they take %.0f MiB",
            len(self._steps),
            limits.most_rows,
            time.perf_counter() - started,
            (free - _free_memory(decoder.device)) / MIB,
        )

    @property
    def limits(self) -> GraphLimits:
        """What was recorded."""
        return self._limits

    def takes(self, batch: HostBatch) -> bool:
        """Whether the batch is a decode step, with trees or without, that a recording has room for."""
        rows = len(batch.token_ids)
        return (
            batch.is_tree_step
            and not batch.routed  # gates come and go, a recording holds addresses
            and rows <= (self._limits.max_rows if batch.is_decode else self._limits.max_tree_rows)
            and max(batch.context_len) <= self._limits.max_context
            and max(len(blocks) for blocks in batch.blocks) <= self._limits.blocks_of_row
            and _pages_of(batch.pages) <= self._limits.pages_of_step(rows)
        )

    @torch.inference_mode()
    def forward(self, batch: HostBatch) -> Outputs:
        """Of all rows of a batch that `takes` accepts. They hold until the next call."""
        trees = not batch.is_decode
        size = StepSize(
            rows=first_that_holds(self._limits.tree_buckets if trees else self._limits.buckets, len(batch.token_ids)),
            reach=first_that_holds(self._limits.reaches, max(batch.context_len)),
            adapted=any(pages is not None for pages in batch.pages),
            trees=trees,
        )
        return self._steps[size].run(batch)


def _sizes(limits: GraphLimits) -> list[StepSize]:
    """The largest first: the others find all their memory in the pool."""
    return [
        StepSize(rows, reach, adapted, trees)
        for trees, buckets in ((True, limits.tree_buckets), (False, limits.buckets))
        for rows, reach, adapted in product(reversed(buckets), reversed(limits.reaches), (True, False))
    ]


class _Recording:
    """Records steps that share their inputs, their outputs and, for what is between, their memory."""

    def __init__(
        self, decoder: Decoder, kv: KVCache, pools: AdapterPools, recorder: Recorder, limits: GraphLimits
    ) -> None:
        self._decoder, self._kv, self._pools = decoder, kv, pools
        self._recorder = recorder
        self._limits = limits
        self._pool = recorder.new_pool()
        self._buffer, self._row_numbers = StepInputs.allocate(limits, decoder.device)
        config, dtype, device = decoder.config, decoder.backend.compute_dtype, decoder.device
        self._outputs = Outputs(
            hidden_LE=torch.empty((limits.most_rows, config.hidden_size), dtype=dtype, device=device),
            logits_LV=torch.empty((limits.most_rows, config.vocab_size), dtype=torch.float32, device=device),
        )

    @torch.inference_mode()
    def step(self, size: StepSize) -> RecordedStep:
        inputs = StepInputs(self._limits, size.rows, size.trees, self._buffer, self._row_numbers)
        segments = None
        if size.adapted:
            segments = StaticSegments.allocate(size.rows, self._limits.pages_of_step(size.rows), self._buffer.device)
        batch, outputs = inputs.batch(segments, size.reach), _first(self._outputs, size.rows)

        def run() -> None:
            hidden_TE = self._decoder.hidden(batch, self._kv, self._pools)
            outputs.hidden_LE.copy_(hidden_TE)
            outputs.logits_LV.copy_(self._decoder.logits(hidden_TE))

        inputs.fill(_NO_ROWS)
        return RecordedStep(inputs, segments, outputs, self._recorder.record(run, self._pool))


_NO_ROWS = HostBatch((), (), (), (0,), (), (), (), ())


def _first(outputs: Outputs, rows: int) -> Outputs:
    return Outputs(outputs.hidden_LE[:rows], outputs.logits_LV[:rows])


def _pages_of(lists: Sequence[PageList | None]) -> int:
    """Pages of the work list: those of a segment, once for each of its row tiles."""
    rows_of = Counter(pages for pages in lists if pages is not None)
    return sum(len(pages.pages) * -(-rows // SMALL_TILE_ROWS) for pages, rows in rows_of.items())


def _free_memory(device: torch.device) -> int:
    """Free device bytes; 0 on a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0

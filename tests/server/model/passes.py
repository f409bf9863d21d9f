"""Runs a decoder on hand-made batches: sequences over one paged cache, any of their rows in any pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perseid_kernels.backend import AttentionBatch, Backend
from perseid_kernels.eager_backend import EagerBackend
from perseid_kernels.fused import Outputs
from perseid_kernels.native import load_native_backend
from perseid_kernels.routing import GateTable, RoutedRows, column_pages
from perseid_kernels.segments import PageList, Segments
from perseid_server.model.batch import StepBatch
from perseid_server.model.build import build_decoder
from perseid_server.model.checkpoint import Checkpoint
from perseid_server.model.decoder import AdapterPools, Decoder
from perseid_server.model.kv_cache import KVCache
from tests.tools import require_tool

CPU = torch.device("cpu")
BLOCK_SIZE = 16
TOLERANCE = 1e-4  # of float32 logits


def backend_named(name: str) -> Backend:
    """A float32 backend of the CPU."""
    if name == "eager":
        return EagerBackend()
    if name == "triton":
        from perseid_kernels.triton_backend import TritonBackend  # noqa: PLC0415  (TRITON_INTERPRET must be set)

        return TritonBackend(CPU, torch.float32)
    native = load_native_backend()
    if native is None:
        require_tool("c++", "Debian: g++")
    return native


def decoder_of(checkpoint: Checkpoint, backend: Backend, max_tokens: int) -> Decoder:
    """The checkpoint packed for a backend, with rotary tables for so many positions."""
    return build_decoder(checkpoint, backend, CPU, max_tokens)


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens `start` to `end` of a sequence: the rows it puts into a pass."""

    sequence: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Route:
    """How a gate set routes a sequence."""

    table: GateTable
    pages_of_columns: tuple[tuple[int, ...], ...]  # of sequences with one table, the same
    k: int
    temperature: float
    allowed: tuple[int, ...]  # 1 where a column may be chosen


class Passes:
    """Sequences in one cache. Their blocks interleave and run backwards, so that no table is in order by accident;
    what was never written is NaN, and so is block 0, which the padding of the tables names."""

    def __init__(
        self,
        decoder: Decoder,
        checkpoint: Checkpoint,
        prompts: Sequence[Sequence[int]],
        pools: AdapterPools | None = None,
        pages: Sequence[PageList | None] = (),
        routes: Sequence[Route | None] = (),
    ) -> None:
        self._decoder = decoder
        self._prompts = prompts
        self._pools = pools
        self._pages = pages or [None] * len(prompts)
        self._routes = routes or [None] * len(prompts)
        self.routed: tuple[RoutedRows, ...] = ()  # of the last pass
        longest = -(-max(len(prompt) for prompt in prompts) // BLOCK_SIZE)
        last = longest * len(prompts)
        self._blocks = [[last - (i * len(prompts) + s) for i in range(longest)] for s in range(len(prompts))]
        self._cache = KVCache.allocate(checkpoint.spec, last + 1, BLOCK_SIZE, CPU, torch.float32)
        for cache in (*self._cache.keys, *self._cache.values):
            cache.fill_(float("nan"))

    def run(self, *parts: Part) -> list[Tensor]:
        """One forward pass, as the runner does it; the logits of every row of each part."""
        return self._run(self._decoder.bind(self._cache, self._pools), parts)

    def run_op_by_op(self, *parts: Part) -> list[Tensor]:
        """The same by the decoder's own ops, which is what a backend's whole pass stands for."""
        return self._run(lambda batch: self._decoder.forward(batch, self._cache, self._pools), parts)

    def _run(self, forward: Callable[[StepBatch], Outputs], parts: Sequence[Part]) -> list[Tensor]:
        counts = [part.end - part.start for part in parts]
        return list(forward(self._batch(parts, counts)).logits_LV.split(counts))

    def _batch(self, parts: Sequence[Part], counts: list[int]) -> StepBatch:
        rows = [(part.sequence, position) for part in parts for position in range(part.start, part.end)]
        widest = max(-(-part.end // BLOCK_SIZE) for part in parts) + 1
        table = torch.zeros((len(parts), widest), dtype=torch.int32)
        for row, part in zip(table, parts, strict=True):
            used = self._blocks[part.sequence][: -(-part.end // BLOCK_SIZE)]
            row[: len(used)] = torch.tensor(used)
        self.routed = _routed_rows([self._routes[sequence] for sequence, _ in rows])
        return StepBatch(
            token_ids_T=torch.tensor([self._prompts[sequence][position] for sequence, position in rows]),
            positions_T=torch.tensor([position for _, position in rows]),
            slots_T=torch.tensor([self._slot(sequence, position) for sequence, position in rows]),
            attention=AttentionBatch(
                query_start=torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
                context_len=torch.tensor([part.end for part in parts], dtype=torch.int32),
                block_table=table,
                max_query_len=max(counts),
                max_context_len=max(part.end for part in parts),
            ),
            segments=Segments.build([self._pages[sequence] for sequence, _ in rows]),
            logits_rows=torch.arange(len(rows)),
            routed=self.routed,
        )

    def _slot(self, sequence: int, position: int) -> int:
        return self._blocks[sequence][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


def _routed_rows(routes: Sequence[Route | None]) -> tuple[RoutedRows, ...]:
    """By gate set, in the order of their first rows."""
    tables = dict.fromkeys(route.table for route in routes if route is not None)
    return tuple(_rows_of(table, routes) for table in tables)


def _rows_of(table: GateTable, routes: Sequence[Route | None]) -> RoutedRows:
    rows = {row: route for row, route in enumerate(routes) if route is not None and route.table is table}
    used = list(rows.values())
    pages, indptr = column_pages(used[0].pages_of_columns)
    return RoutedRows(
        table=table,
        rows=torch.tensor(list(rows), dtype=torch.int32),
        k=torch.tensor([route.k for route in used], dtype=torch.int32),
        temperature=torch.tensor([route.temperature for route in used]),
        allowed=torch.tensor([route.allowed for route in used], dtype=torch.int32),
        pages=torch.tensor(pages, dtype=torch.int32),
        page_indptr=torch.tensor(indptr, dtype=torch.int32),
        max_pages=max(len(of_column) for of_column in used[0].pages_of_columns),
        max_k=max(route.k for route in used),
        tally=torch.zeros(len(rows), table.num_columns + 1),
    )


def assert_logits(actual: Tensor, expected: Tensor) -> None:
    """The same float32 logits as the oracle's, NaN nowhere."""
    worst = (actual - expected).abs().max().item()
    assert worst <= TOLERANCE, f"logits differ by {worst:.1e}"

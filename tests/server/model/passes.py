"""Runs a decoder on hand-made batches: sequences over one paged cache, any of their rows in any pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from perseid_kernels.backend import Backend
from perseid_kernels.eager_backend import EagerBackend
from perseid_kernels.fused import Outputs
from perseid_kernels.native import load_native_backend
from perseid_kernels.routing import GateTable, RoutedRows, column_pages
from perseid_kernels.segments import PageList
from perseid_server.model.batch import HostBatch, StepBatch, slot_moves
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

    def tokens(self, prompt: Sequence[int]) -> Sequence[int]:
        """Of each row."""
        return prompt[self.start : self.end]

    @property
    def masks(self) -> list[int]:
        """Ancestor masks: none, as each row sees all before it."""
        return [0] * (self.end - self.start)

    @property
    def positions(self) -> list[int]:
        """Of each row."""
        return list(range(self.start, self.end))


@dataclass(frozen=True, slots=True)
class Tree:
    """Drafted rows of a sequence behind its first `start` tokens, whatever its tokens are from there on."""

    sequence: int
    start: int
    token_ids: tuple[int, ...]  # of each row, the root's first
    masks: tuple[int, ...]  # ancestor masks

    @property
    def end(self) -> int:
        """Tokens in the cache with these rows."""
        return self.start + len(self.masks)

    def tokens(self, _prompt: Sequence[int]) -> Sequence[int]:
        """Of each row."""
        return self.token_ids

    @property
    def positions(self) -> list[int]:
        """Of each row: by its depth."""
        return [self.start + mask.bit_count() - 1 for mask in self.masks]

    def path(self, row: int) -> list[int]:
        """Rows from the root to this one."""
        return [j for j in range(row + 1) if self.masks[row] >> j & 1]


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

    def run(self, *parts: Part | Tree) -> list[Tensor]:
        """One forward pass, as the runner does it; the logits of every row of each part."""
        return [each.logits_LV for each in self.outputs(*parts)]

    def run_op_by_op(self, *parts: Part | Tree) -> list[Tensor]:
        """The same by the decoder's own ops, which is what a backend's whole pass stands for."""
        return [each.logits_LV for each in self.outputs_op_by_op(*parts)]

    def outputs(self, *parts: Part | Tree) -> list[Outputs]:
        """`run`, with the hidden states."""
        return self._run(self._decoder.bind(self._cache, self._pools), parts)

    def outputs_op_by_op(self, *parts: Part | Tree) -> list[Outputs]:
        """`run_op_by_op`, with the hidden states."""
        return self._run(lambda batch: self._decoder.forward(batch, self._cache, self._pools), parts)

    def accept(self, *paths: tuple[Tree, Sequence[int]]) -> None:
        """Move what some rows of trees wrote to where the sequence goes on."""
        moved = [
            [(self._slot(tree.sequence, tree.start + row), self._slot(tree.sequence, tree.start + depth))
             for depth, row in enumerate(rows)]
            for tree, rows in paths
        ]  # fmt: skip
        moves = slot_moves(moved, CPU)
        assert moves is not None
        self._decoder.backend.move_slots(self._cache.keys, self._cache.values, moves)

    def _run(self, forward: Callable[[StepBatch], Outputs], parts: Sequence[Part | Tree]) -> list[Outputs]:
        counts = [part.end - part.start for part in parts]
        outputs = forward(self._batch(parts, counts))
        return [
            Outputs(hidden_LE, logits_LV)
            for hidden_LE, logits_LV in zip(
                outputs.hidden_LE.split(counts), outputs.logits_LV.split(counts), strict=True
            )
        ]

    def _batch(self, parts: Sequence[Part | Tree], counts: list[int]) -> StepBatch:
        sequences = [part.sequence for part in parts for _ in range(part.start, part.end)]
        self.routed = _routed_rows([self._routes[sequence] for sequence in sequences])
        host = HostBatch(
            token_ids=[token for part in parts for token in part.tokens(self._prompts[part.sequence])],
            positions=[position for part in parts for position in part.positions],
            slots=[self._slot(part.sequence, place) for part in parts for place in range(part.start, part.end)],
            query_start=[0, *accumulate(counts)],
            context_len=[part.end for part in parts],
            blocks=[[*self._blocks[part.sequence][: -(-part.end // BLOCK_SIZE)], 0] for part in parts],
            pages=[self._pages[sequence] for sequence in sequences],
            logits_rows=range(len(sequences)),
            ancestors=[mask for part in parts for mask in part.masks],
        )
        return replace(host.on(CPU), routed=self.routed)

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

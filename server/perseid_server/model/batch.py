"""The rows of one step: as plain numbers on the host, and as the tensors the decoder reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from perseid_kernels.backend import AttentionBatch, SlotMoves, TreeRows
from perseid_kernels.routing import GateTable, RoutedRows, column_pages
from perseid_kernels.segments import PageList, Segments
from perseid_kernels.upload import upload


@dataclass(frozen=True, slots=True)
class StepBatch:
    """T rows: prefill chunks, decodes and trees side by side, a sequence's rows together and in order."""

    token_ids_T: Tensor  # int64
    positions_T: Tensor  # int64
    slots_T: Tensor  # int64, cache slot of each row: block · block_size + offset
    attention: AttentionBatch
    segments: Segments | None  # None: no row uses an adapter
    logits_rows: Tensor  # int64 [L], the rows whose next-token logits are wanted
    routed: tuple[RoutedRows, ...] = ()  # one for each gate set in use


@dataclass(frozen=True, slots=True)
class HostRouted:
    """The rows that one gate set routes, before they are on a device: R rows, C columns."""

    table: GateTable
    rows: Sequence[int]  # [R], ascending
    k: Sequence[int]  # [R]
    temperature: Sequence[float]  # [R]
    allowed: Sequence[Sequence[bool]]  # [R][C]
    pages: Sequence[Sequence[int]]  # [C]

    def on(self, device: torch.device) -> RoutedRows:
        """The tensors on `device`, with an empty tally, without waiting for it."""
        pages, page_indptr = column_pages(self.pages)
        host = (
            torch.tensor(self.rows, dtype=torch.int32),
            torch.tensor(self.k, dtype=torch.int32),
            torch.tensor(self.temperature, dtype=torch.float32),
            torch.tensor(self.allowed, dtype=torch.int32),
            torch.tensor(pages, dtype=torch.int32),
            torch.tensor(page_indptr, dtype=torch.int32),
        )
        rows_R, k_R, temperature_R, allowed_RC, pages_J, indptr_C = upload(host, device)
        return RoutedRows(
            table=self.table,
            rows=rows_R,
            k=k_R,
            temperature=temperature_R,
            allowed=allowed_RC,
            pages=pages_J,
            page_indptr=indptr_C,
            max_pages=max(len(pages) for pages in self.pages),
            max_k=max(self.k),
            tally=torch.zeros((len(self.rows), self.table.num_columns + 1), device=device),
        )


@dataclass(frozen=True, slots=True)
class HostBatch:
    """A `StepBatch` before it is on a device: T rows of S sequences, the logits of L rows wanted."""

    token_ids: Sequence[int]  # [T]
    positions: Sequence[int]  # [T]
    slots: Sequence[int]  # [T]
    query_start: Sequence[int]  # [S+1], first row of each sequence, and T
    context_len: Sequence[int]  # [S]
    blocks: Sequence[Sequence[int]]  # [S], cache blocks of each sequence, in order
    pages: Sequence[PageList | None]  # [T]
    logits_rows: Sequence[int]  # [L]
    routed: Sequence[HostRouted] = ()
    ancestors: Sequence[int] = ()  # [T], a tree row's mask (`TreeRows`) without a sign, else 0; () without trees

    @property
    def is_decode(self) -> bool:
        """Whether every sequence has one row and the logits of each are wanted. A tree of one row is a decode."""
        return len(self.token_ids) == len(self.context_len) == len(self.logits_rows)

    @property
    def is_tree_step(self) -> bool:
        """Whether every sequence has one row or is a tree, and the logits of all rows are wanted. So is a decode."""
        return len(self.token_ids) == len(self.logits_rows) and all(
            end - start == 1 or self._is_tree(start) for start, end in self._spans
        )

    def on(self, device: torch.device) -> StepBatch:
        """The tensors on `device`, without waiting for it."""
        host = (
            _longs(self.token_ids),
            _longs(self.positions),
            _longs(self.slots),
            _longs(self.logits_rows),
            torch.tensor(self.query_start, dtype=torch.int32),
            torch.tensor(self.context_len, dtype=torch.int32),
            _block_table(self.blocks),
            *self._tree_rows(),
        )
        token_ids, positions, slots, logits_rows, query_start, context_len, block_table, *trees = upload(host, device)
        return StepBatch(
            token_ids_T=token_ids,
            positions_T=positions,
            slots_T=slots,
            attention=AttentionBatch(
                query_start=query_start,
                context_len=context_len,
                block_table=block_table,
                max_query_len=max(1 if self._is_tree(start) else end - start for start, end in self._spans),
                max_context_len=max(self.context_len),
                trees=TreeRows(*trees) if trees else None,
            ),
            segments=Segments.build(self.pages, device),
            logits_rows=logits_rows,
            routed=tuple(rows.on(device) for rows in self.routed),
        )

    @property
    def _spans(self) -> list[tuple[int, int]]:
        """First row of each sequence, and the row after its last."""
        return list(pairwise(self.query_start))

    def _is_tree(self, first_row: int) -> bool:
        return bool(self.ancestors) and self.ancestors[first_row] != 0

    def _tree_rows(self) -> tuple[Tensor, ...]:
        """The fields of `TreeRows`; nothing where no sequence is a tree."""
        trees = [(s, start, end) for s, (start, end) in enumerate(self._spans) if self._is_tree(start)]
        if not trees:
            return ()
        rows = [row for _, start, end in trees for row in range(start, end)]
        sequences = [s for s, start, end in trees for _ in range(start, end)]
        ancestors = np.array(self.ancestors, dtype=np.uint64).view(np.int64)
        ints = (torch.tensor(values, dtype=torch.int32) for values in (rows, sequences))
        return (torch.from_numpy(ancestors), *ints)


def slot_moves(paths: Sequence[Sequence[tuple[int, int]]], device: torch.device) -> SlotMoves | None:
    """Moves of each path's slots, (source, target) in the order of the sequence, on `device` without waiting for it.
    What lies where it belongs is left out; None where nothing is to move."""
    moved = [[(source, target) for source, target in path if source != target] for path in paths]
    moves = [move for path in moved for move in path]
    if not moves:
        return None
    host = (
        _longs([source for source, _ in moves]),
        _longs([target for _, target in moves]),
        torch.tensor([0, *accumulate(len(path) for path in moved if path)], dtype=torch.int32),
    )
    return SlotMoves(*upload(host, device))


def _longs(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _block_table(blocks: Sequence[Sequence[int]]) -> Tensor:
    """int32 [S, most blocks], padded with zeros that nothing reads."""
    width = max(len(of_sequence) for of_sequence in blocks)
    rows = [[*of_sequence, *[0] * (width - len(of_sequence))] for of_sequence in blocks]
    return torch.tensor(rows, dtype=torch.int32)

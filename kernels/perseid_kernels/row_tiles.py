"""The work list of the low-rank ops: built once a step on the host, uploaded once, read by every layer.

A *row tile* is up to `tile_rows` rows of one segment. An *item* is one page of one row tile. The shrink works on
items and slices; the expand on row tiles and column tiles, looping over the tile's items. So nothing is done for
rows without an adapter, and a segment of rank 16 costs one page though its neighbour has rank 256.

How much work there is stands in a tensor, and the kernels' programs share it out among themselves: the grid is the
same whatever a step holds. `StaticSegments` keeps segments and work list at fixed addresses, so that a CUDA graph
captured once serves every later step: fill it, replay.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from perseid_kernels.segments import PageList, Segments
from perseid_kernels.upload import Layout, staging, upload

SMALL_TILE_ROWS = 16  # decode: a few rows of each adapter; 16 is tl.dot's least side
LARGE_TILE_ROWS = 64  # prefill: each page of A and B is read once for 64 rows


@dataclass(frozen=True, slots=True)
class RowTiles:
    """Room for W row tiles and I items, of which `counts` says how many are real; int32, on the segments' device."""

    tiles: Tensor  # [W, 4]: first index into segments.rows, number of rows, first item, end of items
    items: Tensor  # [I, 3]: first index into segments.rows, number of rows, index into segments.pages
    counts: Tensor  # [2]: real tiles, real items
    tile_rows: int

    @property
    def num_tiles(self) -> int:
        """W"""
        return self.tiles.shape[0]

    @property
    def num_items(self) -> int:
        """I"""
        return self.items.shape[0]

    @staticmethod
    def build(segments: Segments, tile_rows: int | None = None) -> "RowTiles":
        """Cut each segment's rows into tiles. `tile_rows` is chosen by `choose_tile_rows` unless given."""
        height = tile_rows or choose_tile_rows(segments.max_rows)
        tiles, items = _cut(_sizes(segments), height)
        host = (_table(tiles, 4), _table(items, 3), _counts(tiles, items))
        tiles_W4, items_I3, counts = upload(host, segments.rows.device)
        return RowTiles(tiles_W4, items_I3, counts, height)


@dataclass(frozen=True, slots=True)
class StaticSegments(Segments):
    """Segments of at most so many rows and pages, at fixed addresses, with their work list.

    Its sizes (`max_rows`, `max_pages`, `sizes`) are not those of a step: kernels read `tiles` alone. Only the Triton
    backend takes it.
    """

    tiles: RowTiles = field(kw_only=True)
    buffer: Tensor = field(kw_only=True)  # uint8: what all of them are views of
    layout: Layout = field(kw_only=True)

    @staticmethod
    def allocate(max_rows: int, max_pages: int, device: torch.device) -> "StaticSegments":
        """Room for `max_rows` rows with an adapter whose segments' pages are `max_pages` together (a page counts
        once for each 16 rows of its segment). Empty until it is filled: an empty one adds nothing."""
        layout = Layout(
            (
                (torch.int32, (2,)),
                (torch.int32, (max_rows,)),
                (torch.int32, (max_pages,)),
                (torch.float32, (max_pages,)),
                (torch.int32, (max_rows, 4)),
                (torch.int32, (max_pages, 3)),
            )
        )
        buffer = torch.zeros(layout.nbytes, dtype=torch.uint8, device=device)
        counts, rows, pages, weights, tiles, items = layout.views(buffer)
        unused = torch.zeros(1, dtype=torch.int32, device=device)
        return StaticSegments(
            rows=rows,
            indptr=unused,
            pages=pages,
            weights=weights,
            page_indptr=unused,
            max_pages=max_pages,
            max_rows=max_rows,
            tiles=RowTiles(tiles, items, counts, SMALL_TILE_ROWS),
            buffer=buffer,
            layout=layout,
        )

    def fill(self, lists: Sequence[PageList | None]) -> None:
        """`lists[t]` is what row t uses, None for the base: one copy, which does not wait for the device. Raises
        ValueError when it does not fit."""
        host = staging(self.layout.nbytes, self.buffer.device)
        counts, rows, pages, weights, tiles, items = self.layout.views(host)
        built = Segments.build(lists)
        cut_tiles, cut_items = _cut(built.sizes, SMALL_TILE_ROWS) if built is not None else ([], [])
        num_rows = built.rows.numel() if built is not None else 0
        if num_rows > self.max_rows or len(cut_items) > self.max_pages:
            raise ValueError(
                f"{num_rows} rows and {len(cut_items)} pages do not fit into "
                f"{self.max_rows} rows and {self.max_pages} pages"
            )
        counts.copy_(_counts(cut_tiles, cut_items))  # what lies behind them is not read, whatever it is
        if built is not None:
            for target, values in (
                (rows, built.rows),
                (pages, built.pages),
                (weights, built.weights),
                (tiles, _table(cut_tiles, 4)),
                (items, _table(cut_items, 3)),
            ):
                target[: values.shape[0]].copy_(values)
        self.buffer.copy_(host, non_blocking=True)


def choose_tile_rows(max_rows: int) -> int:
    """Small tiles until the longest segment fills two of them: below that a large one is mostly padding."""
    return SMALL_TILE_ROWS if max_rows <= 2 * SMALL_TILE_ROWS else LARGE_TILE_ROWS


def _cut(
    sizes: Sequence[tuple[int, int]], height: int
) -> tuple[list[tuple[int, int, int, int]], list[tuple[int, int, int]]]:
    """(tiles, items) of segments of so many (rows, pages)."""
    tiles: list[tuple[int, int, int, int]] = []
    items: list[tuple[int, int, int]] = []
    first_row = first_page = 0
    for num_rows, num_pages in sizes:
        for start in range(first_row, first_row + num_rows, height):
            count = min(height, first_row + num_rows - start)
            tiles.append((start, count, len(items), len(items) + num_pages))
            items.extend((start, count, first_page + j) for j in range(num_pages))
        first_row += num_rows
        first_page += num_pages
    return tiles, items


def _sizes(segments: Segments) -> list[tuple[int, int]]:
    """(rows, pages) of each segment, from the host copy `Segments.build` keeps, else read back (a device sync)."""
    if segments.sizes:
        return list(segments.sizes)
    rows = [end - start for start, end in pairwise(segments.indptr.tolist())]
    pages = [end - start for start, end in pairwise(segments.page_indptr.tolist())]
    return list(zip(rows, pages, strict=True))


def _counts(tiles: Sequence[object], items: Sequence[object]) -> Tensor:
    return torch.tensor([len(tiles), len(items)], dtype=torch.int32)


def _table(values: Sequence[tuple[int, ...]], width: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32).view(-1, width)

"""The work list of the low-rank ops: built once a step on the host, uploaded once, read by every layer.

A *row tile* is up to `tile_rows` rows of one segment. An *item* is one page of one row tile. The shrink runs one
program per item and slice; the expand runs one program per row tile and column tile and loops over the tile's
items. So nothing is launched for rows without an adapter, and a segment of rank 16 costs one page though its
neighbour has rank 256.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from perseid_kernels.segments import Segments

SMALL_TILE_ROWS = 16  # decode: a few rows of each adapter; 16 is tl.dot's least side
LARGE_TILE_ROWS = 64  # prefill: each page of A and B is read once for 64 rows


@dataclass(frozen=True, slots=True)
class RowTiles:
    """W row tiles, I items; both int32 and on the segments' device."""

    tiles: Tensor  # [W, 4]: first index into segments.rows, number of rows, first item, end of items
    items: Tensor  # [I, 3]: first index into segments.rows, number of rows, index into segments.pages
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
        tiles: list[tuple[int, int, int, int]] = []
        items: list[tuple[int, int, int]] = []
        first_row = first_page = 0
        for num_rows, num_pages in _sizes(segments):
            for start in range(first_row, first_row + num_rows, height):
                count = min(height, first_row + num_rows - start)
                tiles.append((start, count, len(items), len(items) + num_pages))
                items.extend((start, count, first_page + j) for j in range(num_pages))
            first_row += num_rows
            first_page += num_pages
        return RowTiles(_upload(tiles, 4, segments), _upload(items, 3, segments), height)


def choose_tile_rows(max_rows: int) -> int:
    """Small tiles until the longest segment fills two of them: below that a large one is mostly padding."""
    return SMALL_TILE_ROWS if max_rows <= 2 * SMALL_TILE_ROWS else LARGE_TILE_ROWS


def _sizes(segments: Segments) -> list[tuple[int, int]]:
    """(rows, pages) of each segment, from the host copy `Segments.build` keeps, else read back (a device sync)."""
    if segments.sizes:
        return list(segments.sizes)
    rows = [end - start for start, end in pairwise(segments.indptr.tolist())]
    pages = [end - start for start, end in pairwise(segments.page_indptr.tolist())]
    return list(zip(rows, pages, strict=True))


def _upload(values: Sequence[tuple[int, ...]], width: int, segments: Segments) -> Tensor:
    return torch.tensor(values, dtype=torch.int32).view(-1, width).to(segments.rows.device)

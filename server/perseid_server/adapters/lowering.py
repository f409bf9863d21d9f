"""From a checked adapter to rank pages: its matrices laid out as the pool holds them, scales included. NumPy only."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perseid_server.adapters.lora import MAX_HEADS, PAGE_RANK, CheckedAdapter, HeadSite, Pair, Site, scaled
from perseid_server.adapters.tensor_file import TensorFile
from perseid_server.model.spec import FUSED_LINEARS, BaseSpec

HEADS = "medusa_heads"
"""The fused linear of Medusa heads' first blocks, which is in no layer (`HEADS_LAYER`)."""
HEADS_LAYER = -1


@dataclass(frozen=True, slots=True)
class LoweredPair:
    """One projection's product, Δ = Bᵀ A, at the rank it has."""

    a: NDArray[np.float32]  # [rank, d_in]
    b: NDArray[np.float32]  # [rank, d_out], scale included


@dataclass(frozen=True, slots=True)
class LoweredLinear:
    """One fused linear of one layer: a pair for each projection, None for those that the adapter leaves alone.

    `a` and `b` lay them out as pages, zeros where there is nothing; only the pairs are held.
    """

    layer: int
    fused: str  # a key of FUSED_LINEARS, or HEADS
    pairs: tuple[LoweredPair | None, ...]
    widths: tuple[int, ...]  # d_out of each projection
    num_inputs: int
    num_pages: int

    @property
    def nbytes(self) -> int:
        """Host bytes held."""
        return sum(pair.a.nbytes + pair.b.nbytes for pair in self.pairs if pair is not None)

    @property
    def a(self) -> NDArray[np.float32]:
        """[pages, PAGE_RANK · projections, d_in]"""
        a = np.zeros((self.num_pages, len(self.pairs), PAGE_RANK, self.num_inputs), np.float32)
        for index, pair in enumerate(self.pairs):
            for page, rows in enumerate(_in_pages(pair.a) if pair is not None else ()):
                a[page, index, : len(rows)] = rows
        return a.reshape(self.num_pages, len(self.pairs) * PAGE_RANK, self.num_inputs)

    @property
    def b(self) -> NDArray[np.float32]:
        """[pages, PAGE_RANK, Σ d_out]"""
        b = np.zeros((self.num_pages, PAGE_RANK, sum(self.widths)), np.float32)
        start = 0
        for width, pair in zip(self.widths, self.pairs, strict=True):
            for page, rows in enumerate(_in_pages(pair.b) if pair is not None else ()):
                b[page, : len(rows), start : start + width] = rows
            start += width
        return b


def _in_pages(rows: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    for start in range(0, len(rows), PAGE_RANK):
        yield rows[start : start + PAGE_RANK]


def lower(adapter: CheckedAdapter, base: BaseSpec) -> Iterator[LoweredLinear]:
    """The adapter, ready to be written to rank pages, one fused linear at a time; those it does not touch are left
    out."""
    for layer in adapter.info.layers:
        for fused, projections in FUSED_LINEARS.items():
            found = [adapter.pairs.get(Site(layer, projection)) for projection in projections]
            if any(pair is not None for pair in found):
                yield LoweredLinear(
                    layer,
                    fused,
                    pairs=tuple(_lower_pair(adapter.file, pair) if pair is not None else None for pair in found),
                    widths=tuple(base.projections[projection].out_features for projection in projections),
                    num_inputs=base.fused_shape(fused).in_features,
                    num_pages=adapter.info.num_pages,
                )


def lower_heads(adapter: CheckedAdapter, base: BaseSpec) -> Iterator[LoweredLinear]:
    """What it changes of Medusa heads, if it changes any: their first blocks, which share their input."""
    if adapter.head_pairs:
        found = [adapter.head_pairs.get(HeadSite(head)) for head in range(MAX_HEADS)]
        yield LoweredLinear(
            HEADS_LAYER,
            HEADS,
            pairs=tuple(_lower_pair(adapter.file, pair) if pair is not None else None for pair in found),
            widths=(base.hidden_size,) * MAX_HEADS,
            num_inputs=base.hidden_size,
            num_pages=adapter.info.num_pages,
        )


def _lower_pair(file: TensorFile, pair: Pair) -> LoweredPair:
    b = scaled(file.read(pair.b), pair.scale)
    return LoweredPair(file.read(pair.a), np.ascontiguousarray(b.T))

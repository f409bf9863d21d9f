"""Samples laid out as one pass of the decoder.

Samples that begin alike share those blocks of the cache: their beginning is run once, on the base, as a sequence of
its own. What is computed is the same as for each sample alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from perseid_kernels.segments import PageList
from perseid_server.model.batch import HostBatch
from perseid_server.training.samples import Sample


@dataclass(frozen=True, slots=True)
class Rows:
    """Which token of which sample each row of a pass is. Sample −1 is the shared beginning."""

    host: HostBatch
    samples: tuple[int, ...]  # [T]
    places: tuple[int, ...]  # [T]


def lay_out(
    samples: Sequence[Sample],
    shared: Sequence[int],
    block_size: int,
    page_list: Callable[[int], PageList | None],
    *,
    wanted: Callable[[int, int], bool] = lambda _sample, _place: False,
) -> Rows:
    """All rows of `samples`, after whole blocks of `shared` tokens that all of them begin with. `wanted` says of
    which rows (sample, place) the logits are wanted."""
    start = len(shared) // block_size * block_size
    spans = [(-1, 0, start)] if start else []
    spans += [(index, start, len(sample)) for index, sample in enumerate(samples)]
    common = list(range(start // block_size))
    blocks = [common] if start else []
    for sample in samples:
        first = max((block for of_one in blocks for block in of_one), default=-1) + 1
        blocks.append([*common, *range(first, first + -(-(len(sample) - start) // block_size))])
    rows = [
        (index, place, of_one)
        for (index, begin, end), of_one in zip(spans, blocks, strict=True)
        for place in range(begin, end)
    ]
    host = HostBatch(
        token_ids=[shared[place] if index < 0 else samples[index].token_ids[place] for index, place, _ in rows],
        positions=[place for _, place, _ in rows],
        slots=[of_one[place // block_size] * block_size + place % block_size for _, place, of_one in rows],
        query_start=[0, *accumulate(end - begin for _, begin, end in spans)],
        context_len=[end for _, _, end in spans],
        blocks=blocks,
        pages=[None if index < 0 else page_list(samples[index].columns[place]) for index, place, _ in rows],
        logits_rows=[row for row, (index, place, _) in enumerate(rows) if index >= 0 and wanted(index, place)],
    )
    return Rows(host, tuple(index for index, _, _ in rows), tuple(place for _, place, _ in rows))

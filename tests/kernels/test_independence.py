"""A row's result does not depend on its neighbours: bitwise the same alone and in any batch.

The Triton kernels promise it for every op; the eager backend only where torch does not choose a kernel by the
number of rows (its products and low-rank sums are equal within rounding, which the other tests show).

`ordered_dot` makes the interpreter's `tl.dot` like a tensor core's, so that what is tested is the kernels' own order:
the splits of K, the chunks, the pages, the spans.
"""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch

from perseid_kernels import matmul_common, matmul_q4, matmul_q8
from perseid_kernels.backend import Backend
from perseid_kernels.matmul_common import TILES, choose_config, inputs_of_split, num_splits
from perseid_kernels.rank_pages import RankPages
from perseid_kernels.row_tiles import LARGE_TILE_ROWS, choose_tile_rows
from perseid_kernels.segments import PageList, Segments
from perseid_kernels.triton_backend import TritonBackend
from perseid_kernels.weights import DenseWeight
from tests.kernels.cases import (
    DEVICE,
    INTERPRETED,
    attention_batch,
    int4_weight,
    int8_weight,
    lora_pool,
    random_page_lists,
)

pytestmark = pytest.mark.usefixtures("ordered_dot")


@pytest.fixture(params=["parallel", "serial"])
def how_k_is_split(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Over programs, as products of a test's size are, or within one, as those of many tiles are."""
    if request.param == "serial":
        monkeypatch.setattr(matmul_common, "_FULL", 0)
    choose_config.cache_clear()
    yield request.param
    choose_config.cache_clear()


@pytest.mark.parametrize("num_rows", [17, 130])
def test_products(
    triton_backend: TritonBackend,
    rng: torch.Generator,
    num_rows: int,
    how_k_is_split: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Across the row classes, and one row with K split over programs against any way of splitting it."""
    for weight in (
        int4_weight(rng, 70, 544, 32, "q4_1"),
        int4_weight(rng, 33, 576, 64, "nf4"),
        int8_weight(rng, 33, 544, 32),
        DenseWeight(torch.randn(33, 1056, generator=rng)),  # four splits: with two, any order of adding is equal
    ):
        num_outputs, num_inputs = weight.shape
        assert num_splits(num_outputs, num_inputs) > 1
        packed = triton_backend.pack(weight, DEVICE)
        x = torch.randn(num_rows, num_inputs, generator=rng).to(DEVICE)
        together = torch.empty(num_rows, num_outputs, device=DEVICE)
        triton_backend.matmul(x, packed, together)
        assert choose_config(num_outputs, num_inputs, num_rows).parallel == (how_k_is_split == "parallel")
        with monkeypatch.context() as decode:
            decode.setattr(matmul_common, "_FULL", 0.9)
            choose_config.cache_clear()
            alone = torch.empty(1, num_outputs, device=DEVICE)
            triton_backend.matmul(x[-1:], packed, alone)
        choose_config.cache_clear()
        assert torch.equal(alone[0], together[-1])


@pytest.mark.skipif(not INTERPRETED, reason="a device has the tiles of its own kind only")
def test_tiles_of_another_device_sum_in_the_same_order(
    triton_backend: TritonBackend, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sm_90's tiles are larger, in rows and along K; they run here too."""
    for weight in (int4_weight(rng, 70, 640, 32, "q4_1"), int8_weight(rng, 33, 576, 32)):
        packed = triton_backend.pack(weight, DEVICE)
        outs = []
        for kind in ("sm_80", "sm_90"):
            for module in (matmul_q4, matmul_q8):
                monkeypatch.setattr(module, "device_class", lambda device, kind=kind: kind)
            x = torch.randn(40, weight.shape[1], generator=torch.Generator().manual_seed(2)).to(DEVICE)
            outs.append(torch.empty(40, weight.shape[0], device=DEVICE))
            triton_backend.matmul(x, packed, outs[-1])
        assert torch.equal(*outs)
    assert TILES["sm_80"].by_rows[64] != TILES["sm_90"].by_rows[64]


@pytest.mark.parametrize("kind", list(TILES))
def test_the_split_of_k_ignores_the_rows(kind: str) -> None:
    for num_rows in (1, 16, 17, 32, 33, 64, 128, 4096):
        assert choose_config(4096, 14336, num_rows, kind).splits == num_splits(4096, 14336)


@pytest.mark.parametrize("kind", list(TILES))
def test_a_grid_that_leaves_the_device_idle_splits_k(kind: str) -> None:
    """Decode splits over programs; a long prefill has tiles enough and keeps its sum in one program."""
    assert choose_config(4096, 4096, 1, kind).parallel
    assert choose_config(4096, 4096, 64, kind).parallel
    assert not choose_config(4096, 4096, 4096, kind).parallel
    assert choose_config(28672, 4096, 4096, kind).tile == TILES[kind].many


def test_splits_are_whole_chunks_and_cover_k() -> None:
    for num_outputs, num_inputs, chunk in [(4096, 4096, 128), (4096, 14336, 128), (33, 1056, 64), (960, 576, 64)]:
        splits, length = num_splits(num_outputs, num_inputs), inputs_of_split(num_outputs, num_inputs, chunk)
        assert length % chunk == 0
        assert (splits - 1) * length < num_inputs <= splits * length


def test_low_rank_sums(triton_backend: TritonBackend, rng: torch.Generator) -> None:
    """Across small and large row tiles: 36 rows share an adapter, one has 16 pages."""
    slices, num_inputs = (20, 12), 1056
    a, b = (pool.to(DEVICE) for pool in lora_pool(rng, 20, num_inputs, slices))
    lists = [*random_page_lists(rng, 8, 20), *[PageList.of((0, 1))] * 36]
    x = torch.randn(44, num_inputs, generator=rng).to(DEVICE)
    y = torch.randn(44, sum(slices), generator=rng).to(DEVICE)
    segments = Segments.build(lists, DEVICE)
    assert segments is not None
    assert choose_tile_rows(segments.max_rows) == LARGE_TILE_ROWS
    together = y.clone()
    pages = RankPages.of(a, b, slices)
    triton_backend.add_lora(x, pages, segments, together)
    for row in (1, 2, 3, 43):
        alone_segments = Segments.build([lists[row]], DEVICE)
        assert alone_segments is not None
        alone = y[row : row + 1].clone()
        triton_backend.add_lora(x[row : row + 1], pages, alone_segments, alone)
        assert torch.equal(alone[0], together[row]), f"row {row}"


def test_attention(backend: Backend, rng: torch.Generator) -> None:
    """Each sequence alone and beside neighbours of other kinds and lengths (other spans, other table widths)."""
    new_rows, cached = [1, 7, 1, 20], [30, 3, 1030, 40]
    batch, blocks = attention_batch(rng, new_rows, cached, 16)
    k, v = (torch.randn(blocks, 16, 2, 32, generator=rng).to(DEVICE) for _ in range(2))
    q = torch.randn(sum(new_rows), 4, 32, generator=rng).to(DEVICE)
    together = torch.empty_like(q)
    backend.attention(q, k, v, batch, 0.2, together)
    starts = batch.query_start.tolist()
    for s, (start, end) in enumerate(pairwise(starts)):
        only = type(batch)(
            query_start=torch.tensor([0, end - start], dtype=torch.int32, device=DEVICE),
            context_len=batch.context_len[s : s + 1],
            block_table=batch.block_table[s : s + 1],
            max_query_len=end - start,
            max_context_len=int(batch.context_len[s]),
        )
        alone = torch.empty_like(q[start:end])
        backend.attention(q[start:end], k, v, only, 0.2, alone)
        assert torch.equal(alone, together[start:end]), f"sequence {s}"


def test_row_ops(backend: Backend, rng: torch.Generator) -> None:
    x, weight = torch.randn(9, 310, generator=rng).to(DEVICE), torch.randn(310, generator=rng).to(DEVICE)
    for op in (lambda rows: backend.rms_norm(rows, weight, 1e-5), backend.silu_mul):
        assert torch.equal(op(x)[4:5], op(x[4:5]))

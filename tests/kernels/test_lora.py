"""Shrink, expand and add_lora on the killer case of `random_segments`."""

import pytest
import torch
from torch import Tensor

from perseid_kernels.backend import Backend
from perseid_kernels.expand import expand_oracle
from perseid_kernels.rank_pages import RankPages
from perseid_kernels.row_tiles import LARGE_TILE_ROWS, SMALL_TILE_ROWS, RowTiles, StaticSegments
from perseid_kernels.segments import PAGE_RANK, PageList, Segments
from perseid_kernels.shrink import shrink, shrink_oracle
from perseid_kernels.triton_backend import TritonBackend
from tests.kernels.cases import DEVICE, SENTINEL, assert_sum, lora_pool, random_page_lists, random_segments

NUM_PAGES = 20
# (inputs, slices): qkv with unequal widths; one odd slice; inputs that are split over K; eight heads of equal widths
FUSED = [(96, (70, 33, 33)), (311, (65,)), (1056, (24, 8)), (64, (64,) * 8)]


def host(segments: Segments) -> Segments:
    """The segments on the CPU, for the oracle."""
    tensors = (segments.rows, segments.indptr, segments.pages, segments.weights, segments.page_indptr)
    rows, indptr, pages, weights, page_indptr = (tensor.cpu() for tensor in tensors)
    return Segments(rows, indptr, pages, weights, page_indptr, segments.max_pages, segments.max_rows)


def by_row_and_page(z: Tensor, tiles: RowTiles, segments: Segments) -> Tensor:
    """The kernel's z [I, splits, C, tile_rows] in the oracle's order [R, J, C]."""
    ordered = torch.zeros(segments.rows.numel(), segments.max_pages, z.shape[2])
    for tile in tiles.tiles.tolist():
        first, count, first_item, end_item = tile
        for j, item in enumerate(range(first_item, end_item)):
            ordered[first : first + count, j] = z[item].sum(0).T[:count].cpu()
    return ordered


@pytest.mark.parametrize(
    ("num_inputs", "slices", "tile_rows"),
    [
        (*FUSED[0], SMALL_TILE_ROWS),
        (*FUSED[0], LARGE_TILE_ROWS),
        (*FUSED[1], LARGE_TILE_ROWS),
        (*FUSED[2], SMALL_TILE_ROWS),
    ],
)
def test_shrink_equals_the_definition(
    rng: torch.Generator, num_inputs: int, slices: tuple[int, ...], tile_rows: int
) -> None:
    segments = random_segments(rng, 11, NUM_PAGES)
    a, b = lora_pool(rng, NUM_PAGES, num_inputs, slices)
    pages = RankPages.of(a.to(DEVICE), b.to(DEVICE), slices)
    x = torch.randn(11, num_inputs, generator=rng)
    tiles = RowTiles.build(segments, tile_rows)
    z = by_row_and_page(shrink(x.to(DEVICE), pages, segments, tiles), tiles, segments)
    magnitude = shrink_oracle(x.abs(), a.abs(), host(segments))
    assert_sum(z, shrink_oracle(x, a, host(segments)), magnitude, num_inputs)


@pytest.mark.parametrize(
    ("num_rows", "num_inputs", "slices"),
    [(8, *FUSED[0]), (150, *FUSED[0]), (23, *FUSED[1]), (8, *FUSED[2]), (9, *FUSED[3])],
)
def test_add_lora_equals_the_definition(
    backend: Backend, rng: torch.Generator, num_inputs: int, slices: tuple[int, ...], num_rows: int
) -> None:
    segments = random_segments(rng, num_rows, NUM_PAGES)
    a, b = lora_pool(rng, NUM_PAGES, num_inputs, slices)
    x, y = torch.randn(num_rows, num_inputs, generator=rng), torch.randn(num_rows, sum(slices), generator=rng)
    wide = torch.full((num_rows, sum(slices) + 5), SENTINEL)
    wide[:, 2:-3] = y
    wide = wide.to(DEVICE)
    backend.add_lora(x.to(DEVICE), RankPages.of(a.to(DEVICE), b.to(DEVICE), slices), segments, wide[:, 2:-3])

    on_host = host(segments)
    expected = expand_oracle(shrink_oracle(x, a, on_host), b, slices, on_host, y)
    weights = on_host.weights.abs()
    sizes = Segments(on_host.rows, on_host.indptr, on_host.pages, weights, on_host.page_indptr, on_host.max_pages, 0)
    magnitude = expand_oracle(shrink_oracle(x.abs(), a.abs(), sizes), b.abs(), slices, sizes, y.abs())
    assert_sum(wide[:, 2:-3], expected, magnitude, num_inputs + PAGE_RANK * segments.max_pages)

    assert (wide[:, :2] == SENTINEL).all()
    assert (wide[:, -3:] == SENTINEL).all()
    outside = torch.ones(num_rows, dtype=torch.bool)
    outside[on_host.rows.long()] = False
    assert outside[0]
    assert outside[-1]
    assert torch.equal(wide[:, 2:-3].cpu()[outside], y[outside]), "a row without an adapter was touched"


def test_padding_lanes_read_no_page(triton_backend: Backend, rng: torch.Generator) -> None:
    """Rows and pages of other adapters hold NaN: one value read from them would show."""
    num_inputs, slices = 64, (40,)
    a, b = lora_pool(rng, NUM_PAGES, num_inputs, slices)
    x = torch.randn(9, num_inputs, generator=rng)
    lists: list[PageList | None] = [None] * 9
    lists[4] = PageList((3, 7), (1.0, 2.0))
    used = torch.zeros(NUM_PAGES, dtype=torch.bool)
    used[[3, 7]] = True
    a[~used], b[~used] = float("nan"), float("nan")
    x[:4], x[5:] = float("nan"), float("nan")
    segments = Segments.build(lists, DEVICE)
    assert segments is not None
    out = torch.full((9, 40), -0.0, device=DEVICE)  # −0 + 0 is 0: adding nothing would show too
    triton_backend.add_lora(x.to(DEVICE), RankPages.of(a.to(DEVICE), b.to(DEVICE), slices), segments, out)
    expected = x[4] @ a[3].T @ b[3] + 2 * (x[4] @ a[7].T @ b[7])
    torch.testing.assert_close(out[4].cpu(), expected, rtol=1e-4, atol=1e-3)
    assert torch.signbit(out[[0, 1, 2, 3, 5, 6, 7, 8]]).all(), "a row without an adapter was written"


def test_a_blend_of_one_adapter_is_that_adapter(backend: Backend, rng: torch.Generator) -> None:
    a, b = lora_pool(rng, NUM_PAGES, 64, (40,))
    x = torch.randn(3, 64, generator=rng).to(DEVICE)
    outs = []
    for pages in (PageList.of((4, 9)), PageList((4, 9), (1.0, 1.0))):
        segments = Segments.build([pages, None, pages], DEVICE)
        assert segments is not None
        outs.append(torch.zeros(3, 40, device=DEVICE))
        backend.add_lora(x, RankPages.of(a.to(DEVICE), b.to(DEVICE), (40,)), segments, outs[-1])
    assert torch.equal(*outs)


def test_row_tiles_cover_each_row_and_page_once(rng: torch.Generator) -> None:
    lists = random_page_lists(rng, 150, NUM_PAGES)
    segments = Segments.build(lists, DEVICE)
    assert segments is not None
    for height in (SMALL_TILE_ROWS, LARGE_TILE_ROWS):
        tiles = RowTiles.build(segments, height)
        covered: dict[int, list[int]] = {}
        for first, count, first_item, end_item in tiles.tiles.tolist():
            assert 0 < count <= height
            items = tiles.items[first_item:end_item].tolist()
            assert all(item[:2] == [first, count] for item in items)
            for row in segments.rows[first : first + count].tolist():
                assert row not in covered
                covered[row] = [int(segments.pages[item[2]]) for item in items]
        assert covered == {row: list(pages.pages) for row, pages in enumerate(lists) if pages is not None}


def test_row_tiles_need_no_device_read_back(rng: torch.Generator) -> None:
    """With the host copy of the sizes the device's index tensors are not looked at."""
    segments = Segments.build(random_page_lists(rng, 20, NUM_PAGES))
    assert segments is not None
    meta = torch.empty(0, dtype=torch.int32, device="meta")
    blind = Segments(segments.rows, meta, segments.pages, segments.weights, meta, 16, 20, segments.sizes)
    assert torch.equal(RowTiles.build(blind).items, RowTiles.build(segments).items)


def test_no_adapter_at_all_builds_no_segments() -> None:
    assert Segments.build([None, None]) is None
    assert Segments.build([PageList((), ()), None]) is None
    assert Segments.build([]) is None


def test_static_segments_serve_step_after_step(triton_backend: TritonBackend, rng: torch.Generator) -> None:
    """Fill, replay what was recorded once: each step's rows and pages, bit for bit as with segments of its own."""
    slices = (24, 8)
    a, b = (pool.to(DEVICE) for pool in lora_pool(rng, NUM_PAGES, 64, slices))
    pages = RankPages.of(a, b, slices)
    x, out = torch.randn(20, 64, generator=rng).to(DEVICE), torch.empty(20, 32, device=DEVICE)
    static = StaticSegments.allocate(max_rows=20, max_pages=200, device=DEVICE)
    addresses = [tensor.data_ptr() for tensor in (static.rows, static.tiles.items, static.tiles.counts)]

    def step() -> None:
        out.zero_()
        triton_backend.add_lora(x, pages, static, out)

    replay = triton_backend.record(step)
    assert (out == 0).all(), "empty segments added something"
    busy = random_page_lists(rng, 20, NUM_PAGES)
    for lists in (busy, [None] * 20, [PageList.of((3,))] * 20, [*busy[:4], *[None] * 16]):
        static.fill(lists)
        replay()
        expected = torch.zeros_like(out)
        segments = Segments.build(lists, DEVICE)
        if segments is not None:
            triton_backend.add_lora(x, pages, segments, expected)
        assert torch.equal(out, expected)
    assert addresses == [tensor.data_ptr() for tensor in (static.rows, static.tiles.items, static.tiles.counts)]


def test_static_segments_say_when_a_step_does_not_fit(rng: torch.Generator) -> None:
    static = StaticSegments.allocate(max_rows=8, max_pages=2, device=DEVICE)
    with pytest.raises(ValueError, match="9 rows and 1 pages do not fit"):
        static.fill([PageList.of((1,))] * 9)
    with pytest.raises(ValueError, match="2 rows and 3 pages do not fit"):
        static.fill([PageList.of((1, 2)), PageList.of((3,))])


def test_a_slice_that_a_page_leaves_alone_is_not_read(triton_backend: TritonBackend, rng: torch.Generator) -> None:
    """Its A is zero by contract; here it is NaN, which would show, and its outputs stay as they were to the bit."""
    a, b = lora_pool(rng, 2, 64, (24, 8))
    a[1, :PAGE_RANK], b[1, :, :24] = float("nan"), float("nan")
    live = torch.tensor([[16, 16], [0, 16]], dtype=torch.int32, device=DEVICE)
    pages = RankPages(a.to(DEVICE), b.to(DEVICE), live, (24, 8))
    segments = Segments.build([PageList.of((1,)), PageList.of((0, 1))], DEVICE)
    assert segments is not None
    x = torch.randn(2, 64, generator=rng)
    out = torch.full((2, 32), -0.0, device=DEVICE)
    triton_backend.add_lora(x.to(DEVICE), pages, segments, out)
    assert torch.signbit(out[0, :24]).all(), "a projection without an adapter was written"
    torch.testing.assert_close(out[1, :24].cpu(), x[1] @ a[0, :16].T @ b[0, :, :24], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(out[0, 24:].cpu(), x[0] @ a[1, 16:].T @ b[1, :, 24:], rtol=1e-4, atol=1e-3)

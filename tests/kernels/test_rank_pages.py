"""Rank pages: what is written is what is read, and a rank costs what it uses."""

import mmap
from pathlib import Path

import pytest
import torch

from perseid_kernels.backend import Backend
from perseid_kernels.rank_pages import RankPages
from perseid_kernels.segments import PAGE_RANK, PageList, Segments
from tests.kernels.cases import DEVICE

SLICES, NUM_INPUTS = (24, 8, 16), 48


def page(rng: torch.Generator, ranks: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of one page whose slices use so many rows of A; B is full, as it must not matter beyond them."""
    a = torch.randn(PAGE_RANK * len(SLICES), NUM_INPUTS, generator=rng)
    for i, rank in enumerate(ranks):
        a[i * PAGE_RANK + rank : (i + 1) * PAGE_RANK] = 0
    return a, torch.randn(PAGE_RANK, sum(SLICES), generator=rng)


def new_pages() -> RankPages:
    return RankPages.allocate(4, NUM_INPUTS, SLICES, DEVICE, torch.float32)


@pytest.mark.parametrize("ranks", [(16, 16, 16), (1, 0, 16), (0, 0, 0), (8, 9, 7)])
def test_writing_finds_the_rows_in_use(rng: torch.Generator, ranks: tuple[int, ...]) -> None:
    pages = new_pages()
    a, b = page(rng, ranks)
    pages.write(2, *(tensor.to(DEVICE) for tensor in page(rng, (13, 13, 13))))  # what was there before must go
    pages.write(2, a.to(DEVICE), b.to(DEVICE))
    assert pages.live.tolist() == [[0, 0, 0], [0, 0, 0], list(ranks), [0, 0, 0]]
    assert torch.equal(pages.a[2].cpu(), a)
    for rank, held, given in zip(ranks, pages.b[2].cpu().split(SLICES, 1), b.split(SLICES, 1), strict=True):
        assert torch.equal(held[:rank], given[:rank])
        assert not held[rank:].any()
    pages.clear(2)
    assert not any(tensor[2].any() for tensor in (pages.a, pages.b, pages.live))


def test_a_write_that_fails_half_way_leaves_nothing_for_the_next(rng: torch.Generator) -> None:
    pages, clean = new_pages(), new_pages()
    a, b = page(rng, (16, 16, 16))
    with pytest.raises(RuntimeError):
        pages.write(1, a.to(DEVICE), b[:, : SLICES[0]].to(DEVICE))  # ends at the second slice's columns
    a, b = page(rng, (4, 0, 4))
    for each in (pages, clean):
        each.write(1, a.to(DEVICE), b.to(DEVICE))
    for held, expected in ((pages.a, clean.a), (pages.b, clean.b), (pages.live, clean.live)):
        assert torch.equal(held, expected)


def test_a_zero_row_between_others_is_in_use(rng: torch.Generator) -> None:
    pages = new_pages()
    a, b = page(rng, (5, 5, 5))
    a[2] = 0
    pages.write(0, a.to(DEVICE), b.to(DEVICE))
    assert pages.live[0].tolist() == [5, 5, 5]


@pytest.mark.parametrize("ranks", [(16, 16, 16), (1, 0, 16), (3, 8, 9), (0, 0, 0)])
def test_rows_beyond_the_rank_change_nothing(backend: Backend, rng: torch.Generator, ranks: tuple[int, ...]) -> None:
    """The same sum as with every row read, in every slice."""
    pages = new_pages()
    a, b = page(rng, ranks)
    pages.write(1, a.to(DEVICE), b.to(DEVICE))
    segments = Segments.build([PageList.of((1,)), None, PageList.of((1,))], DEVICE)
    assert segments is not None
    x = torch.randn(3, NUM_INPUTS, generator=rng)
    sums = []
    for held in (pages, RankPages.of(pages.a, pages.b, SLICES)):
        sums.append(torch.zeros(3, sum(SLICES), device=DEVICE))
        backend.add_lora(x.to(DEVICE), held, segments, sums[-1])
    assert torch.equal(*sums)
    parts = [
        x @ a[i * PAGE_RANK : (i + 1) * PAGE_RANK].T @ part for i, part in enumerate(torch.split(b, SLICES, dim=1))
    ]
    expected = torch.cat(parts, dim=1)
    expected[1] = 0
    torch.testing.assert_close(sums[0].cpu(), expected, rtol=1e-4, atol=1e-4)


def taken(tensor: torch.Tensor) -> int:
    """Bytes of a tensor that are in memory, whatever else this process does (Linux: bit 63 of a page's entry)."""
    first, entry = tensor.data_ptr() // mmap.PAGESIZE, 8
    num_pages = -(-tensor.nbytes // mmap.PAGESIZE)
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        pagemap.seek(first * entry)
        entries = pagemap.read(num_pages * entry)
    return sum(byte >> 7 for byte in entries[entry - 1 :: entry]) * mmap.PAGESIZE


@pytest.mark.skipif(DEVICE.type != "cpu", reason="of a CPU's memory")
def test_memory_is_taken_as_it_is_written() -> None:
    wide = 1 << 20
    pages = RankPages.allocate(8, wide, (64,), DEVICE, torch.float32)  # 0.5 GB
    assert taken(pages.a) == 0
    a = torch.zeros(1, 1).expand(PAGE_RANK, wide).clone()
    a[0] = 1
    pages.write(3, a, torch.ones(PAGE_RANK, 64))
    row = 4 * wide
    assert row <= taken(pages.a) <= 2 * row, "one row of one page; systems may round up to their large pages"


def test_bytes_per_page_is_what_a_page_takes() -> None:
    pages = new_pages()
    held = sum(tensor.nbytes for tensor in (pages.a, pages.b, pages.live))
    assert held == 4 * RankPages.bytes_per_page(NUM_INPUTS, SLICES, torch.float32)

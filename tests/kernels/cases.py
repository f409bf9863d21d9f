"""Generators that always produce the killer case, and tolerances with their derivation."""

import os

import torch
from torch import Tensor

from perseid_kernels.backend import AttentionBatch
from perseid_kernels.segments import PAGE_RANK, PageList, Segments
from perseid_kernels.weights import Int4Weight, Int8Weight

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
SENTINEL = 1234.5  # exactly representable in every float type

UNIT_ROUNDOFF = 2.0**-24  # float32: half an ULP of 1

# NF4's levels as QLoRA gives them (arXiv:2305.14314, appendix E), rounded to six digits
NF4 = torch.tensor([-1, -0.696193, -0.525073, -0.394917, -0.284441, -0.184773, -0.091050, 0, 0.079580, 0.160930,
                    0.246112, 0.337915, 0.440710, 0.562617, 0.722956, 1.0])  # fmt: skip
CODEBOOKS = {"q4_0": torch.arange(16.0) - 8, "q4_1": torch.arange(16.0), "nf4": NF4}


def int4_weight(rng: torch.Generator, num_outputs: int, num_inputs: int, group_size: int, kind: str) -> Int4Weight:
    """Random codes; every group has its own scale, and its own offset in q4_1."""
    groups = (num_outputs, num_inputs // group_size)
    return Int4Weight(
        codes=torch.randint(0, 256, (num_outputs, num_inputs // 2), generator=rng, dtype=torch.uint8),
        codebook=CODEBOOKS[kind],
        scale=torch.rand(groups, generator=rng) + 0.1,
        offset=torch.randn(groups, generator=rng) if kind == "q4_1" else None,
        group_size=group_size,
    )


def int8_weight(rng: torch.Generator, num_outputs: int, num_inputs: int, group_size: int) -> Int8Weight:
    """Random codes with both ends of the range present."""
    codes = torch.randint(-128, 128, (num_outputs, num_inputs), generator=rng, dtype=torch.int8)
    codes[0, :2] = torch.tensor([-128, 127], dtype=torch.int8)
    scale = (torch.rand(num_outputs, num_inputs // group_size, generator=rng) + 0.1) / 64
    return Int8Weight(codes, scale, group_size)


def random_page_lists(rng: torch.Generator, num_rows: int, num_pages: int) -> list[PageList | None]:
    """What each row uses. Always holds rows without an adapter (the first and the last), a segment of one row, a
    rank-256 adapter of 16 scattered pages, a blend with a negative weight, and segments of unequal lengths."""
    assert num_rows >= 8
    assert num_pages >= 19
    pages = torch.randperm(num_pages, generator=rng).tolist()
    rank_256 = PageList.of(pages[:16])
    one_page = PageList.of(pages[16:17])
    blend = PageList(tuple(pages[16:19]), (0.75, -0.5, 0.125))
    lists: list[PageList | None] = [None] * num_rows
    lists[1] = rank_256  # the only row of its segment
    for row in range(2, num_rows - 1):
        lists[row] = [one_page, None, blend, one_page][int(torch.randint(0, 4, (1,), generator=rng))]
    lists[2:6] = [one_page, blend, None, one_page]
    return lists


def random_segments(rng: torch.Generator, num_rows: int, num_pages: int) -> Segments:
    """`random_page_lists` as segments, with an empty segment in front and no host copy of the sizes."""
    built = Segments.build(random_page_lists(rng, num_rows, num_pages), DEVICE)
    assert built is not None
    front = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    return Segments(
        rows=built.rows,
        indptr=torch.cat((front, built.indptr)),
        pages=built.pages,
        weights=built.weights,
        page_indptr=torch.cat((front, built.page_indptr)),
        max_pages=built.max_pages,
        max_rows=built.max_rows,
    )


def lora_pool(rng: torch.Generator, num_pages: int, num_inputs: int, slices: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(A [P, C, K], B [P, PAGE_RANK, N]) of a fused linear."""
    a = torch.randn(num_pages, PAGE_RANK * len(slices), num_inputs, generator=rng)
    b = torch.randn(num_pages, PAGE_RANK, sum(slices), generator=rng)
    return a, b


def attention_batch(
    rng: torch.Generator, new_rows: list[int], cached: list[int], block_size: int
) -> tuple[AttentionBatch, int]:
    """Sequences with so many new rows on top of so many cached tokens, in shuffled blocks, and how many blocks
    the cache has. Block 0 belongs to nobody; unused table entries name a block far outside the cache."""
    context = [new + old for new, old in zip(new_rows, cached, strict=True)]
    needed = [-(-tokens // block_size) for tokens in context]
    order = (torch.randperm(sum(needed), generator=rng) + 1).tolist()
    table = torch.full((len(context), max(needed) + 1), 1 << 20, dtype=torch.int32)
    for s, count in enumerate(needed):
        table[s, :count] = torch.tensor([order.pop() for _ in range(count)])
    start = torch.tensor([0, *new_rows]).cumsum(0).to(torch.int32)
    batch = AttentionBatch(
        query_start=start.to(DEVICE),
        context_len=torch.tensor(context, dtype=torch.int32, device=DEVICE),
        block_table=table.to(DEVICE),
        max_query_len=max(new_rows),
        max_context_len=max(context),
    )
    return batch, sum(needed) + 1


def assert_sum(actual: Tensor, expected: Tensor, magnitude: Tensor, terms: int) -> None:
    """Two float32 sums of the same `terms` products agree as far as rounding allows. `magnitude` is Σ |x_i · w_i|.

    Max: a sum of n terms in any order is within n · u of the exact one, relative to Σ |terms| (Higham, Accuracy and
    Stability, §4.2): two sums are within 2 n u. RMS: rounding errors are a random walk, so √n in place of n, times
    2 for the two sums and 2 for luck. Forming a weight and a final scaling add a few roundings: n + 8.
    """
    error = (actual.cpu().double() - expected.double()).abs()
    size = magnitude.cpu().double()
    steps = terms + 8
    worst = (error / size.clamp_min(1e-30)).max().item()
    assert worst <= 2 * steps * UNIT_ROUNDOFF, f"max-relative error {worst:.2e}"
    rms = (error.pow(2).mean().sqrt() / size.pow(2).mean().sqrt()).item()
    assert rms <= 4 * steps**0.5 * UNIT_ROUNDOFF, f"RMS error {rms:.2e}"

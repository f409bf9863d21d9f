"""Shrink + expand on a grid of rows, ranks and adapters, with vLLM's and SGLang's kernels beside, where installed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from perseid_kernels.bench.peers import PEERS, Peer
from perseid_kernels.bench.roofline import Rates, lora_work, pages_of
from perseid_kernels.bench.sections import Deadline, Report, Row, points
from perseid_kernels.bench.timing import seconds
from perseid_kernels.bench.weights import random_pages
from perseid_kernels.rank_pages import RankPages
from perseid_kernels.segments import PAGE_RANK, PageList, Segments
from perseid_kernels.triton_backend import TritonBackend

Point = tuple[int, int, int]  # rows, rank, adapters
GRID: tuple[Point, ...] = tuple(
    (rows, rank, adapters)
    for rank in (16, 64, 8, 32, 128)
    for adapters in (8, 1, 64)
    for rows in (1, 64, 4096, 16, 256, 1024)
    if adapters <= rows
)


def page_lists(num_rows: int, rank: int, adapters: int) -> list[PageList | None]:
    """Row t uses adapter t mod `adapters`; the adapters' pages stand one after the other."""
    count = pages_of(rank)
    return [PageList.of(range(t % adapters * count, (t % adapters + 1) * count)) for t in range(num_rows)]


def bench_lora(
    report: Report,
    deadline: Deadline,
    rates: Rates,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    num_inputs: int = 4096,
    slices: tuple[int, ...] = (4096, 1024, 1024),
    grid: Sequence[Point] = GRID,
) -> None:
    """The qkv projection of an 8B model. Target: no slower than either peer at any point."""
    backend = TritonBackend(device, dtype)
    for num_rows, rank, adapters in points(report, deadline, grid):
        pages = random_pages(adapters * pages_of(rank), num_inputs, slices, device, dtype)
        if rank % PAGE_RANK:
            pages = cut_to_rank(pages, rank)
        lists = page_lists(num_rows, rank, adapters)
        segments = Segments.build(lists, device)
        assert segments is not None
        x = torch.randn(num_rows, num_inputs, device=device).to(dtype)
        out = torch.zeros(num_rows, sum(slices), dtype=dtype, device=device)
        taken = seconds(lambda: backend.add_lora(x, pages, segments, out), device)  # noqa: B023  (runs at once)
        work = lora_work(num_rows, num_inputs, slices, rank, adapters, x.element_size())
        row: Row = {
            "rows": num_rows,
            "rank": rank,
            "adapters": adapters,
            "µs": taken * 1e6,
            "floor µs": work.floor(rates) * 1e6,
            "× floor": taken / work.floor(rates),
        }
        expected = torch.zeros_like(out)
        backend.add_lora(x, pages, segments, expected)
        for peer in PEERS:
            row |= beside(peer, x, pages, rank, adapters, expected, taken)
        report.rows.append(row)


def cut_to_rank(pages: RankPages, rank: int) -> RankPages:
    """A rank that does not fill its adapter's last page: the rows beyond it are zero, as the loader leaves them."""
    per_adapter = pages_of(rank)
    in_last = rank - (per_adapter - 1) * PAGE_RANK
    a, live = pages.a.clone(), pages.live.clone()
    by_slice = a.view(a.shape[0], len(pages.slices), PAGE_RANK, -1)
    by_slice[per_adapter - 1 :: per_adapter, :, in_last:] = 0
    live[per_adapter - 1 :: per_adapter] = in_last
    return RankPages(a, pages.b, live, pages.slices)


def beside(peer: Peer, x: Tensor, pages: RankPages, rank: int, adapters: int, expected: Tensor, ours: float) -> Row:
    """The peer's columns: its time and how often ours fits into it, or why there is none."""
    column = f"{peer.name} µs"
    if not peer.installed():
        return {column: "not installed"}
    try:
        out = torch.zeros_like(expected)
        run = peer.prepare(x, pages, rank, adapters, out)
        run()
        error = (out.float() - expected.float()).norm() / expected.float().norm()
        if not float(error) < 0.02:
            return {column: f"other result ({float(error):.1e})"}
        taken = peer.seconds(run, x.device)
    except Exception as problem:  # noqa: BLE001  (another project's interface: a change there is a note here)
        return {column: f"{type(problem).__name__}: {str(problem)[:60]}"}
    return {column: taken * 1e6, f"{peer.name} / ours": taken / ours}

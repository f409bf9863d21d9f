"""Routed sums on a grid of rows, columns and k, beside the same rows with adapters asked for by name."""

from collections.abc import Sequence

import torch

from perseid_kernels.bench.lora import page_lists
from perseid_kernels.bench.roofline import Rates, pages_of, routed_work
from perseid_kernels.bench.sections import Deadline, Report, points
from perseid_kernels.bench.timing import seconds
from perseid_kernels.bench.weights import random_gates, random_pages
from perseid_kernels.gate import choose
from perseid_kernels.routing import Gates, GateTable, RoutedRows, column_pages
from perseid_kernels.segments import Segments
from perseid_kernels.triton_backend import TritonBackend

Point = tuple[int, int, int]  # rows, columns, k
GRID: tuple[Point, ...] = tuple(
    (rows, columns, k) for columns, k in ((9, 2), (65, 2), (9, 1), (9, 8)) for rows in (16, 1, 64, 2048)
)


def routed_rows(gates: Gates, num_rows: int, columns: int, k: int, rank: int, device: torch.device) -> RoutedRows:
    """All rows with all columns allowed; the last is the base's, the others' pages stand one after the other."""
    count = pages_of(rank)
    of_columns = [range(c * count, (c + 1) * count) for c in range(columns - 1)]
    pages, indptr = column_pages([*of_columns, ()])
    return RoutedRows(
        table=GateTable(({"qkv": gates},), torch.zeros(columns, dtype=torch.int32, device=device), columns),
        rows=torch.arange(num_rows, dtype=torch.int32, device=device),
        k=torch.full((num_rows,), k, dtype=torch.int32, device=device),
        temperature=torch.ones(num_rows, device=device),
        allowed=torch.ones(num_rows, columns, dtype=torch.int32, device=device),
        pages=torch.tensor(pages, dtype=torch.int32, device=device),
        page_indptr=torch.tensor(indptr, dtype=torch.int32, device=device),
        max_pages=count,
        max_k=k,
        tally=torch.zeros(num_rows, columns + 1, device=device),
    )


def distinct_adapters(x: torch.Tensor, gates: Gates, routed: RoutedRows) -> tuple[list[int], int]:
    """(adapters that any row chose, in each projection; how often a row chose an adapter and not the base)."""
    columns = choose(x, gates, routed).columns
    adapters = (columns >= 0) & (columns < routed.table.num_columns - 1)
    of_slices = [columns[:, s][adapters[:, s]].unique().numel() for s in range(columns.shape[1])]
    return of_slices, int(adapters.sum())


def bench_routed(
    report: Report,
    deadline: Deadline,
    rates: Rates,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    num_inputs: int = 4096,
    slices: tuple[int, ...] = (4096, 1024, 1024),
    rank: int = 16,
    grid: Sequence[Point] = GRID,
) -> None:
    """The qkv projection of an 8B model. Target: ≤ 1.2 × the floor of gates and chosen pages, in a decode step."""
    backend = TritonBackend(device, dtype)
    for num_rows, columns, k in points(report, deadline, grid):
        pages = random_pages((columns - 1) * pages_of(rank), num_inputs, slices, device, dtype)
        gates = random_gates(columns, num_inputs, len(slices), device)
        routed = routed_rows(gates, num_rows, columns, k, rank, device)
        x = torch.randn(num_rows, num_inputs, device=device).to(dtype)
        out = torch.zeros(num_rows, sum(slices), dtype=dtype, device=device)
        distinct, picks = distinct_adapters(x, gates, routed)
        taken = seconds(lambda: backend.add_routed(x, gates, pages, routed, out), device)  # noqa: B023  (runs at once)
        work = routed_work(num_rows, num_inputs, slices, columns, rank, distinct, picks, x.element_size())
        segments = Segments.build(page_lists(num_rows, rank, min(columns - 1, num_rows)), device)
        assert segments is not None
        by_name = seconds(lambda: backend.add_lora(x, pages, segments, out), device)  # noqa: B023  (runs at once)
        report.rows.append(
            {
                "rows": num_rows,
                "columns": columns,
                "k": k,
                "µs": taken * 1e6,
                "floor µs": work.floor(rates) * 1e6,
                "× floor": taken / work.floor(rates),
                "by name µs": by_name * 1e6,
                "routed / by name": taken / by_name,
                "target met": taken <= 1.2 * work.floor(rates) if num_rows <= 64 else None,
            }
        )

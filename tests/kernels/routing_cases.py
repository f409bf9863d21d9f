"""Generators of routed rows, which always hold the killer case, the backend's answers to them, and how far off those
may be.

Inputs, gates, A and bias are small multiples of 1/8, so that a float32 logit is exact whatever the order of its sum:
all backends see the same ties, and the oracle chooses the same columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import log

import torch
from torch import Tensor

from perseid_kernels.backend import Backend
from perseid_kernels.rank_pages import RankPages
from perseid_kernels.routing import Gates, GateTable, RoutedRows, add_routed_oracle, column_pages
from perseid_kernels.segments import PAGE_RANK, PageList, Segments
from tests.kernels.cases import DEVICE, SENTINEL, UNIT_ROUNDOFF, assert_sum

CPU = torch.device("cpu")
SLICES = (70, 33, 33)
RANKS = (16, 24, 40, 3, 9, 0)  # of each column; the last is the base's
TEMPERATURES = (0.01, 0.5, 1.0, 30.0)


@dataclass(frozen=True)
class Case:
    """A fused linear with its gates, and the rows they route. On the CPU, for the oracle."""

    x_TK: Tensor
    gates: Gates
    pages: RankPages
    routed: RoutedRows
    y_TN: Tensor

    @property
    def rows(self) -> list[int]:
        return self.routed.rows.tolist()

    def with_rows(self, **changes: object) -> "Case":
        return replace(self, routed=replace(self.routed, **changes))

    def with_gates(self, weight: Tensor | None = None, bias: Tensor | None = None) -> "Case":
        gates = self.gates
        return replace(
            self,
            gates=Gates(gates.weight if weight is None else weight, gates.bias if bias is None else bias, gates.gated),
        )

    def only(self, r: int) -> "Case":
        """Routed row r in a batch of its own."""
        one = slice(r, r + 1)
        routed = self.routed
        k = routed.k[one]
        row = self.rows[r]
        return replace(
            self.with_rows(
                rows=torch.zeros(1, dtype=torch.int32),
                k=k,
                temperature=routed.temperature[one],
                allowed=routed.allowed[one],
                max_k=int(k),
                tally=routed.tally[one].clone(),
            ),
            x_TK=self.x_TK[row : row + 1],
            y_TN=self.y_TN[row : row + 1],
        )


def eighths(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-6, 7, shape, generator=rng) / 8


def ints(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def random_pages(
    rng: torch.Generator, ranks: Sequence[int], num_inputs: int, slices: tuple[int, ...]
) -> tuple[RankPages, list[int], list[int]]:
    """Pages of columns with these ranks, scattered, and which are whose. The second column leaves the first projection
    alone, and so does the last page of the third column."""
    counts = [-(-rank // PAGE_RANK) for rank in ranks]
    order = torch.randperm(sum(counts) + 2, generator=rng).tolist()
    of_columns = [[order.pop() for _ in range(count)] for count in counts]
    pages = RankPages.allocate(sum(counts) + 2, num_inputs, slices, CPU, torch.float32)
    for column, (rank, of_column) in enumerate(zip(ranks, of_columns, strict=True)):
        for j, page in enumerate(of_column):
            live = torch.full((len(slices),), min(PAGE_RANK, rank - j * PAGE_RANK))
            if column == 1 or (column == 2 and j == 2):
                live[0] = 0
            in_use = torch.arange(PAGE_RANK) < live[:, None]
            a = eighths(rng, len(slices), PAGE_RANK, num_inputs) + 1  # no row is zero
            pages.write(
                page, (a * in_use[..., None]).view(-1, num_inputs), torch.randn(PAGE_RANK, sum(slices), generator=rng)
            )
            assert pages.live[page].tolist() == live.tolist()
    return pages, *column_pages(of_columns)


def random_case(
    rng: torch.Generator,
    num_rows: int = 9,
    ranks: Sequence[int] = RANKS,
    num_inputs: int = 96,
    slices: tuple[int, ...] = SLICES,
    gated: tuple[bool, ...] = (True, True, True),
) -> Case:
    """Each row has its own k (up to more than there are columns), temperature and allowed columns; some columns count
    by size. Not all rows are routed, and the tally has numbers already."""
    columns = len(ranks)
    pages, numbers, indptr = random_pages(rng, ranks, num_inputs, slices)
    gates = Gates(
        eighths(rng, len(slices) * columns, num_inputs) * torch.tensor(gated).repeat_interleave(columns)[:, None],
        eighths(rng, len(slices) * columns),
        gated,
    )
    absolute = torch.randint(0, 2, (columns,), generator=rng, dtype=torch.int32)
    allowed = torch.randint(0, 4, (num_rows, columns), generator=rng).clamp(max=1).to(torch.int32)
    allowed[torch.arange(num_rows), torch.randint(0, columns, (num_rows,), generator=rng)] = 1
    k = torch.randint(1, columns + 3, (num_rows,), generator=rng, dtype=torch.int32)
    num_tokens = num_rows + num_rows // 2 + 2
    routed = RoutedRows(
        table=GateTable(({"linear": gates},), absolute, columns),
        rows=(torch.randperm(num_tokens - 2, generator=rng)[:num_rows].sort().values + 1).to(torch.int32),
        k=k,
        temperature=torch.tensor(TEMPERATURES)[torch.randint(0, len(TEMPERATURES), (num_rows,), generator=rng)],
        allowed=allowed,
        pages=ints(numbers),
        page_indptr=ints(indptr),
        max_pages=max(end - start for start, end in pairwise(indptr)),
        max_k=int(k.max()),
        tally=torch.rand(num_rows, columns + 1, generator=rng),
    )
    y = torch.randn(num_tokens, sum(slices), generator=rng)
    return Case(eighths(rng, num_tokens, num_inputs), gates, pages, routed, y)


def on_device(case: Case) -> Case:
    """The case on the device under test, with a tally and a y of its own."""
    routed, table, pages = case.routed, case.routed.table, case.pages
    gates = Gates(case.gates.weight.to(DEVICE), case.gates.bias.to(DEVICE), case.gates.gated)
    tensors = {
        name: getattr(routed, name).to(DEVICE)
        for name in ("rows", "k", "temperature", "allowed", "pages", "page_indptr")
    }
    moved = replace(
        routed,
        table=GateTable(({"linear": gates},), table.absolute.to(DEVICE), table.num_columns),
        tally=routed.tally.clone().to(DEVICE),
        **tensors,
    )
    on = RankPages(pages.a.to(DEVICE), pages.b.to(DEVICE), pages.live.to(DEVICE), pages.slices)
    return Case(case.x_TK.to(DEVICE), gates, on, moved, case.y_TN.clone().to(DEVICE))


def run(backend: Backend, case: Case) -> tuple[Tensor, Tensor]:
    """(y, tally) by the backend. x lies in rows that are wider than it and y in columns of a wider tensor: what is
    beside them must be neither read nor written."""
    case = on_device(case)
    num_rows, num_inputs = case.x_TK.shape
    wide_x = torch.full((num_rows, num_inputs + 5), float("nan"), device=DEVICE)
    wide_x[:, :num_inputs] = case.x_TK
    wide_y = torch.full((num_rows, case.y_TN.shape[1] + 5), SENTINEL, device=DEVICE)
    wide_y[:, 2:-3] = case.y_TN
    backend.add_routed(wide_x[:, :num_inputs], case.gates, case.pages, case.routed, wide_y[:, 2:-3])
    assert (wide_y[:, :2] == SENTINEL).all()
    assert (wide_y[:, -3:] == SENTINEL).all()
    return wide_y[:, 2:-3].cpu(), case.routed.tally.cpu()


def by_name(backend: Backend, case: Case, column_of_row: dict[int, int]) -> Tensor:
    """y by `add_lora`, where each of these rows uses the adapter of one column."""
    indptr, pages = case.routed.page_indptr.tolist(), case.routed.pages.tolist()
    lists = {row: PageList.of(pages[indptr[c] : indptr[c + 1]]) for row, c in column_of_row.items()}
    return by_lists(backend, case, lists)


def by_lists(backend: Backend, case: Case, list_of_row: dict[int, PageList]) -> Tensor:
    """y by `add_lora`."""
    case = on_device(case)
    segments = Segments.build([list_of_row.get(row) for row in range(len(case.x_TK))], DEVICE)
    assert segments is not None
    backend.add_lora(case.x_TK, case.pages, segments, case.y_TN)
    return case.y_TN.cpu()


def largest_sums(case: Case) -> Tensor:
    """Per row and output, |y| plus the most that Σ |x · A · B| is over the columns: as weights sum to one, what any
    choice adds is no more."""
    pages, rows = case.pages, case.routed.rows.long()
    a = pages.a.view(pages.a.shape[0], len(pages.slices), PAGE_RANK, -1).abs()
    z = torch.einsum("tk,psrk->sptr", case.x_TK[rows].abs(), a)
    b = pages.b.abs().split(pages.slices, dim=2)
    of_page = torch.cat([torch.einsum("ptr,prn->ptn", z[s], b[s]) for s in range(len(b))], dim=2)
    of_column = [
        of_page[case.routed.pages[start:end].long()].sum(dim=0)
        for start, end in pairwise(case.routed.page_indptr.tolist())
    ]
    return case.y_TN[rows].abs() + torch.stack(of_column).amax(dim=0)


def assert_as_defined(backend: Backend, case: Case) -> None:
    assert_answer(case, *run(backend, case))


def assert_answer(case: Case, y: Tensor, tally: Tensor) -> None:
    expected_y, expected_tally = add_routed_oracle(case.x_TK, case.gates, case.pages, case.routed, case.y_TN)
    assert y.isfinite().all()
    rows = case.routed.rows.long()
    # a row adds the ranks of all its columns' pages; a weight is e^d within |d| u relative, and vanishes below d = −87
    terms = case.x_TK.shape[1] + PAGE_RANK * case.routed.pages.numel() + 87
    assert_sum(y[rows], expected_y[rows], largest_sums(case), terms)
    others = torch.ones(len(y), dtype=torch.bool)
    others[rows] = False
    assert torch.equal(y[others], case.y_TN[others]), "a row that is not routed was touched"

    # Σ shares and Σ shares · d have C terms and so (C + 10) u relative error with the exponential; the entropy is the
    # sum of two numbers that are not negative and no more than ln C. A factor 2 for the exponents' own rounding.
    columns = case.routed.table.num_columns
    decision = 2 * (columns + 10) * UNIT_ROUNDOFF * (1 + log(columns))
    bound = len(case.gates.gated) * (decision + 4 * UNIT_ROUNDOFF * float(tally.abs().max()))
    torch.testing.assert_close(tally.double(), expected_tally, rtol=0, atol=bound)

"""Routed rows against the definition in float64, and bit by bit where a backend promises it.

Inputs, gates, A and bias are small multiples of 1/8, so that a float32 logit is exact whatever the order of its sum:
all backends see the same ties, and the oracle chooses the same columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import log

import pytest
import torch
from torch import Tensor

from perseid_kernels.backend import Backend
from perseid_kernels.rank_pages import RankPages
from perseid_kernels.routing import Gates, GateTable, RoutedRows, add_routed_oracle, column_pages, route
from perseid_kernels.segments import PAGE_RANK, PageList, Segments
from tests.kernels.cases import DEVICE, SENTINEL, UNIT_ROUNDOFF, assert_sum

on_all = pytest.mark.parametrize("backend", ["eager", "native"], indirect=True)
bit_by_bit = pytest.mark.parametrize("backend", ["native"], indirect=True)  # rows do not see their neighbours
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
    """The case on the device under test."""
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
    return Case(case.x_TK.to(DEVICE), gates, on, moved, case.y_TN.to(DEVICE))


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
    y, tally = run(backend, case)
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


@on_all
@pytest.mark.parametrize("num_rows", [1, 2, 9, 300])
def test_rows_of_all_kinds(backend: Backend, rng: torch.Generator, num_rows: int) -> None:
    assert_as_defined(backend, random_case(rng, num_rows))


@on_all
@pytest.mark.parametrize(
    ("num_inputs", "slices", "gated"),
    [
        (311, (65,), (True,)),
        (64, SLICES, (False, True, False)),
        (64, SLICES, (True, False, True)),
        (64, (24, 8), (False, False)),
    ],
)
def test_projections_without_gates_add_nothing(
    backend: Backend, rng: torch.Generator, num_inputs: int, slices: tuple[int, ...], gated: tuple[bool, ...]
) -> None:
    case = random_case(rng, num_inputs=num_inputs, slices=slices, gated=gated)
    assert_as_defined(backend, case)
    y, tally = run(backend, case)
    for projection, before, has_gates in zip(y.split(slices, 1), case.y_TN.split(slices, 1), gated, strict=True):
        assert torch.equal(projection, before) is not has_gates
    assert torch.equal(tally, case.routed.tally) is not any(gated)


@on_all
@pytest.mark.parametrize("ranks", [(24,), (0,), (*(rank % 41 for rank in range(64)), 0)])
def test_one_column_and_many(backend: Backend, rng: torch.Generator, ranks: tuple[int, ...]) -> None:
    assert_as_defined(backend, random_case(rng, 20, ranks))


@on_all
@pytest.mark.parametrize("temperature", [0.01, 30.0])
@pytest.mark.parametrize("k", [1, 2, 6])
def test_temperatures(backend: Backend, rng: torch.Generator, temperature: float, k: int) -> None:
    case = random_case(rng, 12)
    rows = {"temperature": torch.full((12,), temperature), "k": ints([k] * 12), "max_k": k}
    assert_as_defined(backend, case.with_rows(**rows))


@on_all
def test_ties_go_to_the_lowest_column(backend: Backend, rng: torch.Generator) -> None:
    """All gates alike, then two rows that are the same and above the others."""
    case = random_case(rng).with_rows(allowed=torch.ones(9, 6, dtype=torch.int32), k=ints([2] * 9), max_k=2)
    nothing = torch.zeros_like(case.routed.tally)
    equal = case.with_gates(torch.zeros_like(case.gates.weight), torch.ones(18)).with_rows(tally=nothing)
    assert_as_defined(backend, equal)
    _, tally = run(backend, equal)
    assert torch.equal(tally[:, :6], torch.tensor([1.5, 1.5, 0, 0, 0, 0]).expand(9, 6))
    torch.testing.assert_close(tally[:, 6], torch.full((9,), 3 * log(6)))

    weight, bias = case.gates.weight.clone(), case.gates.bias.clone()
    bias[:] = -100
    weight[2::6], bias[2::6] = weight[4::6], 100
    bias[4::6] = 100
    absolute = replace(case.routed.table, absolute=torch.zeros(6, dtype=torch.int32))
    twins = case.with_gates(weight, bias).with_rows(table=absolute, tally=nothing, k=ints([1] * 9), max_k=1)
    assert_as_defined(backend, twins)
    _, tally = run(backend, twins)
    assert torch.equal(tally[:, :6], torch.tensor([0.0, 0, 3, 0, 0, 0]).expand(9, 6))


@on_all
def test_the_base_takes_its_share_and_adds_nothing(backend: Backend, rng: torch.Generator) -> None:
    """Alone, and between two others in the ranking."""
    case = random_case(rng)
    only_base = case.with_rows(allowed=torch.eye(6, dtype=torch.int32)[5].expand(9, 6).contiguous())
    y, tally = run(backend, only_base)
    assert torch.equal(y, case.y_TN)
    assert torch.equal(tally[:, 5], case.routed.tally[:, 5] + 1 + 1 + 1)
    assert torch.equal(tally[:, [0, 1, 2, 3, 4, 6]], case.routed.tally[:, [0, 1, 2, 3, 4, 6]])

    bias = torch.tensor([-200.0, 201, -200, 199, -200, 200]).repeat(3)
    between = case.with_gates(torch.zeros_like(case.gates.weight), bias).with_rows(
        allowed=torch.ones(9, 6, dtype=torch.int32), k=ints([1, 2, 3] * 3), max_k=3, temperature=torch.ones(9)
    )
    assert_as_defined(backend, between)
    _, tally = run(backend, between)
    chosen = (tally - case.routed.tally)[:3, :6] > 0
    assert chosen.tolist() == [
        [False, True, False, False, False, False],
        [False, True, False, False, False, True],
        [False, True, False, True, False, True],
    ]


@on_all
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_extreme_logits(backend: Backend, rng: torch.Generator, temperature: float) -> None:
    """Nothing overflows, and what is far below vanishes."""
    case = random_case(rng)
    bias = torch.tensor([1e4, -1e4, 0.0, 1e4, -1e4, 1e4]).repeat(3)
    assert_as_defined(backend, case.with_gates(bias=bias).with_rows(temperature=torch.full((9,), temperature)))


@on_all
def test_pages_that_nobody_may_choose_are_not_read(backend: Backend, rng: torch.Generator) -> None:
    """They hold NaN, and so do rows that are not routed."""
    case = random_case(rng)
    allowed = case.routed.allowed.clone()
    allowed[:, [0, 2]], allowed[:, 5] = 0, 1
    used = set(case.routed.pages.tolist()) - {
        page
        for column in (0, 2)
        for page in case.routed.pages[case.routed.page_indptr[column] : case.routed.page_indptr[column + 1]].tolist()
    }
    unused = [page for page in range(case.pages.a.shape[0]) if page not in used]
    case.pages.a[unused], case.pages.b[unused] = float("nan"), float("nan")
    others = [row for row in range(len(case.x_TK)) if row not in case.rows]
    case.x_TK[others] = float("nan")
    y, _ = run(backend, case.with_rows(allowed=allowed))
    assert y.isfinite().all()


@on_all
def test_one_allowed_column_is_that_adapter_by_name(backend: Backend, rng: torch.Generator) -> None:
    """Bit by bit, whatever k and temperature are."""
    case = random_case(rng, 24)
    choice = torch.arange(24) % 6
    y, tally = run(backend, case.with_rows(allowed=torch.eye(6, dtype=torch.int32)[choice]))
    assert torch.equal(y, by_name(backend, case, dict(zip(case.rows, choice.tolist(), strict=True))))
    weights = (tally - case.routed.tally)[:, :6]
    torch.testing.assert_close(weights, 3 * torch.eye(6)[choice])


@bit_by_bit
def test_the_best_column_alone_is_that_adapter_by_name(backend: Backend, rng: torch.Generator) -> None:
    """k = 1 among all columns: each projection has its own adapter, and its bits."""
    case = random_case(rng, 24).with_rows(k=ints([1] * 24), max_k=1)
    y, _ = run(backend, case)
    table = case.routed.table
    start = 0
    for s, width in enumerate(SLICES):
        choice = {}
        of_slice = slice(s * 6, s * 6 + 6)
        for r, row in enumerate(case.rows):
            product = case.gates.weight[of_slice] @ case.x_TK[row]
            logits = torch.where(table.absolute.bool(), product.abs(), product) + case.gates.bias[of_slice]
            ((choice[row],), _, _) = route(logits, case.routed.allowed[r], 1, 1.0)
        assert len(set(choice.values())) > 2
        end = start + width
        assert torch.equal(y[:, start:end], by_name(backend, case, choice)[:, start:end])
        start = end


def by_name(backend: Backend, case: Case, column_of_row: dict[int, int]) -> Tensor:
    """y by `add_lora`, where each of these rows uses the adapter of one column."""
    case = on_device(case)
    indptr, pages = case.routed.page_indptr.tolist(), case.routed.pages.tolist()
    lists: list[PageList | None] = [None] * len(case.x_TK)
    for row, column in column_of_row.items():
        lists[row] = PageList.of(pages[indptr[column] : indptr[column + 1]])
    segments = Segments.build(lists, DEVICE)
    assert segments is not None
    y = case.y_TN.clone()
    backend.add_lora(case.x_TK, case.pages, segments, y)
    return y.cpu()


@bit_by_bit
def test_a_row_alone_has_the_bits_it_has_in_a_batch(backend: Backend, rng: torch.Generator) -> None:
    case = random_case(rng, 150, num_inputs=311)
    case = replace(case, x_TK=torch.randn(case.x_TK.shape, generator=rng))  # sums that round
    y, tally = run(backend, case)
    for r in (0, 1, 2, 63, 64, 148, 149):
        alone, tally_alone = run(backend, case.only(r))
        assert torch.equal(alone[0], y[case.rows[r]]), f"row {r}"
        assert torch.equal(tally_alone[0], tally[r]), f"row {r}"


@bit_by_bit
def test_what_nothing_is_added_to_is_not_written(backend: Backend, rng: torch.Generator) -> None:
    """−0 + 0 is 0: adding nothing would show."""
    case = random_case(rng, gated=(False, True, True))
    allowed = torch.zeros(9, 6, dtype=torch.int32)
    allowed[:, 1] = allowed[3, 5] = 1
    k = torch.ones(9, dtype=torch.int32)
    bias = case.gates.bias.clone()
    bias[5::6] = 1e4
    case = replace(case.with_gates(bias=bias), y_TN=torch.full_like(case.y_TN, -0.0))
    y, _ = run(backend, case.with_rows(allowed=allowed, k=k, max_k=1))
    assert torch.signbit(y[:, :70]).all(), "the projection has no gates"
    others = [row for row in range(len(y)) if row not in case.rows]
    assert torch.signbit(y[[*others, case.rows[3]]]).all(), "the base was chosen, or the row is not routed"
    assert not torch.signbit(y[case.rows[0], 70:]).all()

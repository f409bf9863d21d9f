"""Routed linears by Triton kernels, against the definition in float64 and their own identities."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from perseid_kernels.gate import Choice, choose
from perseid_kernels.rank_pages import RankPages
from perseid_kernels.routed_lora import add_chosen, choose_config
from perseid_kernels.routing import Gates, GateTable, RoutedRows, add_routed_oracle, column_pages
from perseid_kernels.segments import PAGE_RANK, PageList, Segments
from perseid_kernels.triton_backend import TritonBackend
from tests.kernels.cases import DEVICE, SENTINEL, UNIT_ROUNDOFF, lora_pool

RANKS = (1, 2, 0, 3, 1, 0, 1, 4, 1)  # pages of each column; the null column in the middle, one allowed to nobody
TEMPERATURES = (0.01, 1.0, 30.0, 0.7)


@dataclass(frozen=True, slots=True, eq=False)
class Routed:
    """All that one call needs, on the CPU."""

    x: Tensor
    gates: Gates
    pages: RankPages
    rows: RoutedRows
    column_pages: tuple[tuple[int, ...], ...]

    def run(self, backend: TritonBackend, out: Tensor) -> tuple[Tensor, Tensor]:
        """(out, tally) after the call, as new tensors on the CPU."""
        rows, y = on_device(self.rows), out.to(DEVICE, copy=True)
        backend.add_routed(self.x.to(DEVICE), gates_on_device(self.gates), pages_on_device(self.pages), rows, y)
        return y.cpu(), rows.tally.cpu()

    def choose(self) -> Choice:
        """The gates' choice alone, on the CPU."""
        choice = choose(self.x.to(DEVICE), gates_on_device(self.gates), on_device(self.rows))
        return Choice(choice.columns.cpu(), choice.weights.cpu())


def on_device(rows: RoutedRows) -> RoutedRows:
    """A copy with a tally of its own."""
    names = ("rows", "k", "temperature", "allowed", "pages", "page_indptr", "tally")
    table = GateTable(rows.table.layers, rows.table.absolute.to(DEVICE), rows.table.num_columns)
    return replace(rows, table=table, **{name: getattr(rows, name).to(DEVICE, copy=True) for name in names})


def gates_on_device(gates: Gates) -> Gates:
    return Gates(gates.weight.to(DEVICE), gates.bias.to(DEVICE), gates.gated)


def pages_on_device(pages: RankPages) -> RankPages:
    return RankPages(pages.a.to(DEVICE), pages.b.to(DEVICE), pages.live.to(DEVICE), pages.slices)


def routed_case(
    rng: torch.Generator,
    num_rows: int,
    ranks: Sequence[int] = RANKS,
    *,
    num_inputs: int = 96,
    slices: tuple[int, ...] = (70, 33, 33),
    gated: tuple[bool, ...] | None = None,
    max_k: int = 2,
    extra_rows: int = 3,
    shared: int | None = None,
) -> Routed:
    """Every row has its own k, temperature and allowed columns (with `shared` the first so many and the last, so that
    rows choose the same ones); `extra_rows` of the batch are not routed."""
    columns = len(ranks)
    a, b = lora_pool(rng, sum(ranks), num_inputs, slices)
    scattered = torch.randperm(sum(ranks), generator=rng).tolist()
    of_columns = tuple(tuple(scattered.pop() for _ in range(rank)) for rank in ranks)
    pages_J, indptr = column_pages(of_columns)
    has_gates = gated or (True,) * len(slices)
    real = torch.tensor(has_gates).repeat_interleave(columns)
    weight = torch.randn(real.numel(), num_inputs, generator=rng) * real[:, None] / 4
    gates = Gates(weight, torch.randn(real.numel(), generator=rng) * real, has_gates)
    absolute = torch.randint(0, 2, (columns,), generator=rng, dtype=torch.int32)
    k = torch.randint(1, max_k + 1, (num_rows,), generator=rng, dtype=torch.int32)
    k[0] = max_k
    allowed = torch.randint(0, 2, (num_rows, columns), generator=rng, dtype=torch.int32)
    allowed[torch.arange(num_rows), torch.randint(0, columns, (num_rows,), generator=rng)] = 1
    if shared is not None:
        allowed[:, shared:] = 0
        allowed[:, -1] = 1
    in_batch = torch.randperm(num_rows + extra_rows, generator=rng)[:num_rows].sort().values
    rows = RoutedRows(
        table=GateTable(({"qkv": gates},), absolute, columns),
        rows=in_batch.int(),
        k=k,
        temperature=torch.tensor(TEMPERATURES).repeat(num_rows)[:num_rows].clone(),
        allowed=allowed,
        pages=torch.tensor(pages_J, dtype=torch.int32),
        page_indptr=torch.tensor(indptr, dtype=torch.int32),
        max_pages=max(ranks),
        max_k=max_k,
        tally=torch.rand(num_rows, columns + 1, generator=rng),
    )
    x = torch.randn(num_rows + extra_rows, num_inputs, generator=rng)
    return Routed(x, gates, RankPages.of(a, b, slices), rows, of_columns)


def magnitudes(case: Routed) -> Tensor:
    """[R, N]: the most that Σ |x A B| is for any column; weights add up to 1, so a routed sum's terms are no more."""
    x = case.x[case.rows.rows.long()].abs().double()
    found = torch.zeros(x.shape[0], sum(case.pages.slices), dtype=torch.float64)
    for pages in case.column_pages:
        start, of_column = 0, torch.zeros_like(found)
        for s, width in enumerate(case.pages.slices):
            for page in pages:
                a = case.pages.a[page, s * PAGE_RANK : (s + 1) * PAGE_RANK].abs().double()
                end = start + width
                of_column[:, start:end] += x @ a.T @ case.pages.b[page, :, start:end].abs().double()
            start += width
        found = torch.maximum(found, of_column)
    return found


def assert_routed(case: Routed, out: Tensor, actual: Tensor, tally: Tensor) -> None:
    """Within what rounding allows.

    A logit is a sum of K products: within (K + 8) u Σ |G x| (Higham §4.2). A softmax weight moves by at most twice
    a logit's error over T, and the entropy by 2 ln C times it, as Σ |∂H/∂l| ≤ 2 H / T ≤ 2 ln C / T.
    """
    routed, num_inputs = case.rows, case.x.shape[1]
    expected, wanted = add_routed_oracle(case.x, case.gates, case.pages, routed, out)
    x = case.x[routed.rows.long()].double()
    sizes = (x.abs() @ case.gates.weight.abs().double().T + case.gates.bias.abs()).amax(dim=1)
    of_logits = (num_inputs + 8) * UNIT_ROUNDOFF * sizes / routed.temperature.double()
    of_weights = 2 * of_logits + 32 * UNIT_ROUNDOFF
    steps = num_inputs + PAGE_RANK * routed.max_pages * routed.max_k + 8
    error = (actual.double() - expected)[routed.rows.long()].abs()
    size = magnitudes(case) + out[routed.rows.long()].abs()
    assert (error <= (2 * steps * UNIT_ROUNDOFF + of_weights)[:, None] * size).all(), "a sum is off"
    mild = routed.temperature >= 0.5  # errors are a random walk: much smaller than their bound on the whole
    if mild.any():
        rms = error[mild].pow(2).mean().sqrt() / size[mild].pow(2).mean().sqrt()
        assert rms <= 8 * steps**0.5 * UNIT_ROUNDOFF, f"RMS error {float(rms):.2e}"

    off = (tally.double() - wanted).abs()
    assert (off[:, :-1] <= len(case.pages.slices) * of_weights[:, None]).all(), "a share is off"
    columns = max(routed.table.num_columns, 2)
    assert (off[:, -1] <= 2 * len(case.pages.slices) * math.log(columns) * of_weights + 1e-6).all(), "entropy is off"
    outside = torch.ones(out.shape[0], dtype=torch.bool)
    outside[routed.rows.long()] = False
    assert torch.equal(actual[outside], out[outside]), "a row that is not routed was touched"


@pytest.mark.parametrize(
    ("num_rows", "ranks", "sizes"),
    [
        (1, (2, 16, 0, 1), {"num_inputs": 40, "slices": (20, 8)}),  # rank 256
        (2, RANKS, {}),
        (9, RANKS, {"max_k": 3}),  # more rows than columns
        (40, (1, 2, 0, 1), {"num_inputs": 40, "slices": (20, 8), "gated": (False, True)}),  # one row an expand tile
        (70, (1, 2, 0, 1, 4), {"num_inputs": 40, "slices": (20,)}),  # large tiles everywhere
        (3, (2,), {"max_k": 1, "num_inputs": 311, "slices": (40,)}),
        (5, (1,) * 64 + (0,), {"max_k": 4, "num_inputs": 1056, "slices": (24, 8), "shared": 7}),  # K and gates split
        (2, (1,) * 9, {"max_k": 9, "slices": (16, 8, 8), "gated": (True, False, True)}),
    ],
)
def test_equals_the_definition(
    triton_backend: TritonBackend, rng: torch.Generator, num_rows: int, ranks: tuple[int, ...], sizes: dict
) -> None:
    case = routed_case(rng, num_rows, ranks, **sizes)
    out = torch.randn(case.x.shape[0], sum(case.pages.slices), generator=rng)
    assert_routed(case, out, *case.run(triton_backend, out))


def test_rows_of_wider_tensors(triton_backend: TritonBackend, rng: torch.Generator) -> None:
    """x and out are columns of something wider; what stands beside them stays."""
    case = routed_case(rng, 4, num_inputs=48, slices=(20, 8))
    out = torch.randn(7, 28, generator=rng)
    wide_x, wide = torch.full((7, 60), float("nan")), torch.full((7, 33), SENTINEL)
    wide_x[:, 5:53], wide[:, 2:30] = case.x, out
    wide, rows = wide.to(DEVICE), on_device(case.rows)
    strided = wide_x.to(DEVICE)[:, 5:53]
    triton_backend.add_routed(strided, gates_on_device(case.gates), pages_on_device(case.pages), rows, wide[:, 2:30])
    assert_routed(case, out, wide[:, 2:30].cpu(), rows.tally.cpu())
    assert (wide[:, :2] == SENTINEL).all()
    assert (wide[:, 30:] == SENTINEL).all()


def test_rows_in_any_order(triton_backend: TritonBackend, rng: torch.Generator) -> None:
    case = routed_case(rng, 6, num_inputs=48, slices=(20, 8))
    shuffled = replace(case.rows, rows=case.rows.rows[torch.randperm(6, generator=rng)])
    case = replace(case, rows=shuffled)
    out = torch.randn(9, 28, generator=rng)
    assert_routed(case, out, *case.run(triton_backend, out))


def test_ties_go_to_the_lowest_column_and_missing_places_are_marked(rng: torch.Generator) -> None:
    """Logits by hand: columns 1, 3, 4, 6 are equal, 2 is the best; k of 3, of 1, and of 4 with two allowed."""
    case = routed_case(rng, 4, max_k=4, num_inputs=16, slices=(8, 8), gated=(True, False), extra_rows=0)
    levels = torch.tensor([0.0, 2, 5, 2, 2, 1, 2, 0, -1])
    case.gates.weight[:9] = levels[:, None] * torch.eye(16)[0]
    case.gates.bias[:9] = 0
    case.rows.table.absolute.zero_()
    case.x[:, 0] = 1
    case.rows.k.copy_(torch.tensor([3, 1, 4, 1]))
    case.rows.allowed.fill_(1)
    case.rows.allowed[2] = torch.tensor([0, 0, 0, 0, 0, 1, 0, 0, 1])
    case.rows.allowed[3, 2] = 0
    choice = case.choose()
    assert choice.columns[:, 0].tolist() == [[1, 2, 3, -1], [2, -1, -1, -1], [5, 8, -1, -1], [1, -1, -1, -1]]
    assert (choice.columns[:, 1] == -1).all(), "a projection without gates chose"
    softmax = torch.softmax(torch.tensor([1.0, -1.0]) / case.rows.temperature[2], dim=0)
    torch.testing.assert_close(choice.weights[2, 0, :2], softmax)
    assert choice.weights[[1, 3], 0, 0].tolist() == [1.0, 1.0]


def test_where_only_the_base_may_be_chosen_nothing_is_written(
    triton_backend: TritonBackend, rng: torch.Generator
) -> None:
    """−0 + 0 is 0: adding nothing would show. Rows beside them do choose adapters."""
    case = routed_case(rng, 5, num_inputs=32, slices=(20, 8), extra_rows=0)
    case.rows.allowed[1:4] = torch.tensor([0, 0, 1, 0, 0, 0, 0, 0, 0])
    case.rows.allowed[0] = case.rows.allowed[4] = torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 0])
    out = torch.full((5, 28), -0.0)
    actual, tally = case.run(triton_backend, out)
    assert torch.signbit(actual[1:4]).all()
    assert (actual[[0, 4]] != 0).all()
    added = tally - case.rows.tally
    torch.testing.assert_close(added[1:4, 2], torch.full((3,), 2.0))
    assert (added[1:4, [0, 1, 3, 4, 5, 6, 7, 8, 9]] == 0).all()


def test_a_set_without_any_page_still_counts(triton_backend: TritonBackend, rng: torch.Generator) -> None:
    case = routed_case(rng, 2, (1, 0), num_inputs=32, slices=(8,))
    case.rows.allowed[:, 0] = 0
    case.rows.allowed[:, 1] = 1
    nothing = torch.zeros(3, dtype=torch.int32)
    case = replace(case, rows=replace(case.rows, pages=nothing[:0], page_indptr=nothing, max_pages=0))
    out = torch.full((5, 8), -0.0)
    actual, tally = case.run(triton_backend, out)
    assert torch.signbit(actual).all()
    torch.testing.assert_close(tally[:, 1] - case.rows.tally[:, 1], torch.ones(2))


def test_projections_that_are_left_alone_are_not_read(triton_backend: TritonBackend, rng: torch.Generator) -> None:
    """By a page (`live` = 0) or by the gate set: NaN there would show, and −0 stays −0."""
    case = routed_case(rng, 3, (1, 1), num_inputs=32, slices=(20, 8, 8), gated=(True, True, False), extra_rows=0)
    case.rows.allowed.fill_(1)
    case.pages.live[:, 0] = 0
    case.pages.a[:, :PAGE_RANK] = float("nan")
    case.pages.b[:, :, :20] = float("nan")
    case.pages.a[:, 2 * PAGE_RANK :] = float("nan")
    actual, _ = case.run(triton_backend, torch.full((3, 36), -0.0))
    assert torch.signbit(actual[:, :20]).all()
    assert torch.signbit(actual[:, 28:]).all()
    assert actual[:, 20:28].isfinite().all()
    assert (actual[:, 20:28] != 0).all()


def test_extreme_logits(triton_backend: TritonBackend, rng: torch.Generator) -> None:
    """Beyond float32 over a small temperature, and a row of NaN, which is its own loss alone."""
    case = routed_case(rng, 6, num_inputs=32, slices=(20,), max_k=3, extra_rows=0)
    calm = case.run(triton_backend, torch.zeros(6, 20))[0]
    case.gates.weight[2] *= 1e38  # the base's column: ± 1e38 or infinity
    case.rows.temperature.fill_(0.01)
    case.rows.allowed[:, 2] = 1
    case.x[4] = float("nan")
    actual, tally = case.run(triton_backend, torch.zeros(6, 20))
    assert actual[[0, 1, 2, 3, 5]].isfinite().all()
    assert tally.isfinite().all()
    choice = case.choose()
    assert ((choice.columns >= -1) & (choice.columns < 9)).all()
    assert calm.isfinite().all()
    torch.testing.assert_close((tally - case.rows.tally)[:, :9].sum(dim=1), torch.ones(6))


@pytest.mark.parametrize("num_rows", [3, 33, 66])
@pytest.mark.usefixtures("ordered_dot")
def test_one_column_is_the_adapter_asked_for_by_name(
    triton_backend: TritonBackend, rng: torch.Generator, num_rows: int
) -> None:
    """To the bit, in decode and prefill."""
    case = routed_case(rng, num_rows, (1, 3, 0), num_inputs=48, slices=(20, 8), max_k=1, extra_rows=1)
    case.rows.allowed.copy_(torch.tensor([0, 1, 0]).expand(num_rows, 3))
    out = torch.randn(num_rows + 1, 28, generator=rng)
    lists: list[PageList | None] = [None] * (num_rows + 1)
    for row in case.rows.rows.tolist():
        lists[row] = PageList.of(case.column_pages[1])
    segments = Segments.build(lists, DEVICE)
    assert segments is not None
    explicit = out.to(DEVICE, copy=True)
    triton_backend.add_lora(case.x.to(DEVICE), pages_on_device(case.pages), segments, explicit)
    assert torch.equal(case.run(triton_backend, out)[0], explicit.cpu())


@pytest.mark.parametrize("num_rows", [17, 70])
@pytest.mark.usefixtures("ordered_dot")
def test_a_row_does_not_depend_on_its_neighbours(
    triton_backend: TritonBackend, rng: torch.Generator, num_rows: int
) -> None:
    """To the bit, alone as in a decode step and in tiles of either size, beside a row whose adapter holds inf."""
    case = routed_case(rng, num_rows, (1, 2, 0, 1, 3), num_inputs=40, slices=(20, 8), max_k=2, extra_rows=0)
    case.rows.allowed[:, 3] = 0
    case.rows.allowed[:, 0] = 1
    case.rows.allowed[1] = torch.tensor([0, 0, 0, 1, 0])
    case.pages.b[case.column_pages[3][0]] = float("inf")
    out = torch.zeros(num_rows, 28)
    together, tally = case.run(triton_backend, out)
    assert not together[1].isfinite().all()
    for r in (0, num_rows // 2, num_rows - 1):
        one = {name: getattr(case.rows, name)[r : r + 1] for name in ("k", "temperature", "allowed", "tally")}
        alone = replace(case, rows=replace(case.rows, rows=case.rows.rows[r : r + 1], **one))
        by_itself, of_itself = alone.run(triton_backend, out)
        assert torch.equal(by_itself[r], together[r])
        assert torch.equal(of_itself[0], tally[r])
        assert together[r].isfinite().all()


def test_recorded_launches_serve_other_contents(triton_backend: TritonBackend, rng: torch.Generator) -> None:
    """Nothing of the step is read on the host: what was recorded follows new rows, columns and pages."""
    case, other = (routed_case(rng, 3, (1, 2, 0, 1), num_inputs=32, slices=(8, 4)) for _ in range(2))
    case.rows.allowed.copy_(torch.tensor([0, 0, 1, 0]).expand(3, 4))
    other = replace(other, gates=case.gates, pages=case.pages, column_pages=other.column_pages)
    rows, x, y = on_device(case.rows), case.x.to(DEVICE, copy=True), torch.zeros(6, 12, device=DEVICE)
    gates, pages = gates_on_device(case.gates), pages_on_device(case.pages)
    replay = triton_backend.record(lambda: triton_backend.add_routed(x, gates, pages, rows, y))
    assert (y == 0).all()
    for name in ("rows", "k", "temperature", "allowed", "pages", "page_indptr", "tally"):
        getattr(rows, name).copy_(getattr(other.rows, name))
    rows.table.absolute.copy_(other.rows.table.absolute)
    x.copy_(other.x)
    replay()
    assert_routed(other, torch.zeros(6, 12), y.cpu(), rows.tally.cpu())


def test_nothing_is_read_back(
    triton_backend: TritonBackend, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read on the host would wait for the device, and could not be recorded."""
    case = routed_case(rng, 2, (1, 0), num_inputs=32, slices=(8,))
    rows, y = on_device(case.rows), torch.zeros(5, 8, device=DEVICE)
    inputs = (case.x.to(DEVICE), gates_on_device(case.gates), pages_on_device(case.pages), rows)

    def refuse(*_args: object) -> None:
        raise AssertionError("read back from the device")

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
        monkeypatch.setattr(Tensor, name, refuse)
    triton_backend.add_routed(*inputs, y)
    monkeypatch.undo()
    assert_routed(case, torch.zeros(5, 8), y.cpu(), rows.tally.cpu())


def test_no_rows_and_no_gates_do_nothing(triton_backend: TritonBackend, rng: torch.Generator) -> None:
    case = routed_case(rng, 1, (1, 0), num_inputs=32, slices=(8,), gated=(False,))
    out = torch.full((4, 8), -0.0)
    actual, tally = case.run(triton_backend, out)
    assert torch.signbit(actual).all()
    assert torch.equal(tally, case.rows.tally)
    names = ("rows", "k", "temperature", "allowed", "tally")
    empty = replace(case.rows, **{name: getattr(case.rows, name)[:0] for name in names})
    case = replace(case, rows=empty, gates=replace(case.gates, gated=(True,)))
    assert torch.signbit(case.run(triton_backend, out)[0]).all()


def test_the_expand_adds_once_in_the_order_of_columns(rng: torch.Generator) -> None:
    """A choice by hand: float32 sums in ascending columns, then one addition to out."""
    case = routed_case(rng, 1, (1, 1, 1), num_inputs=16, slices=(16,), max_k=3, extra_rows=0)
    big = 2.0**24
    case.x.zero_()
    case.x[0, 0] = 1
    case.pages.a.zero_()
    case.pages.b.zero_()
    case.pages.a[:, 0, 0] = 1
    for (page,), value in zip(case.column_pages, (big, 1.0, -big), strict=True):
        case.pages.b[page, 0] = value
    columns = torch.tensor([[[0, 1, 2]]], dtype=torch.int32, device=DEVICE)
    choice = Choice(columns, torch.ones(1, 1, 3, device=DEVICE))
    out = torch.full((1, 16), 3.0, device=DEVICE)
    add_chosen(case.x.to(DEVICE), pages_on_device(case.pages), on_device(case.rows), choice, out)
    assert (out == 3.0).all(), "(2²⁴ + 1) − 2²⁴ is 0 in float32, in this order alone"


def test_tiles_have_room_for_what_rows_choose() -> None:
    """Few rows have expand programs of their own, and those that choose many columns; splits follow K alone."""
    assert choose_config(1, 4096, 2).expand_rows == choose_config(64, 4096, 8).expand_rows == 1
    assert choose_config(65, 4096, 2).expand_rows == choose_config(65, 4096, 32).shrink_rows == 64
    assert choose_config(2048, 4096, 33).expand_rows == choose_config(2048, 4096, 512).expand_rows == 1
    for rows in (1, 33, 65, 2048):
        assert choose_config(rows, 4096, 2).shrink.splits == 4

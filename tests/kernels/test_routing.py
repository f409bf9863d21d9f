"""Routed rows against the definition in float64, and bit by bit where a backend promises it."""

from collections.abc import Callable
from dataclasses import replace
from math import log

import pytest
import torch

from perseid_kernels.backend import Backend
from perseid_kernels.routing import add_routed_oracle, route
from perseid_kernels.segments import PageList
from tests.kernels.cases import UNIT_ROUNDOFF
from tests.kernels.routing_cases import (
    SLICES,
    TEMPERATURES,
    assert_as_defined,
    by_lists,
    by_name,
    ints,
    random_case,
    run,
)

on_all = pytest.mark.parametrize("backend", ["eager", "native", "triton"], indirect=True)


def bit_by_bit(test: Callable[..., None]) -> Callable[..., None]:
    """On the backends where a row does not see its neighbours."""
    backends = pytest.mark.parametrize("backend", ["native", "triton"], indirect=True)
    return pytest.mark.usefixtures("ordered_dot")(backends(test))


@on_all
@pytest.mark.parametrize("num_rows", [1, 2, 9, 40, 300])
def test_rows_of_all_kinds(backend: Backend, rng: torch.Generator, num_rows: int) -> None:
    assert_as_defined(backend, random_case(rng, num_rows))


@on_all
@pytest.mark.parametrize(
    ("num_inputs", "slices", "gated"),
    [
        (311, (65,), (True,)),
        (1056, (24,), (True,)),
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
@pytest.mark.parametrize("ranks", [(24,), (0,), (3, 256, 0), (*(rank % 41 for rank in range(64)), 0)])
def test_one_column_and_many(backend: Backend, rng: torch.Generator, ranks: tuple[int, ...]) -> None:
    assert_as_defined(backend, random_case(rng, 5, ranks))


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
def test_logits_are_sums_in_float32(backend: Backend, rng: torch.Generator) -> None:
    """Gates and inputs that no shorter format holds.

    A logit is within (K + 8) u Σ |G x| (Higham §4.2), and a weight moves by at most twice as much over T.
    """
    case = random_case(rng, num_inputs=16).with_rows(temperature=torch.ones(9), k=ints([6] * 9), max_k=6)
    weight = torch.randn(case.gates.weight.shape, generator=rng) / 4
    case = replace(case, x_TK=torch.randn(case.x_TK.shape, generator=rng)).with_gates(weight)
    _, tally = run(backend, case)
    _, expected = add_routed_oracle(case.x_TK, case.gates, case.pages, case.routed, case.y_TN)
    sizes = (case.x_TK[case.routed.rows.long()].abs() @ weight.abs().T + case.gates.bias.abs()).amax(dim=1)
    bound = len(SLICES) * (2 * (16 + 8) * sizes + 32) * UNIT_ROUNDOFF
    assert ((tally - expected)[:, :6].abs() <= bound[:, None]).all()


@on_all
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_extreme_logits(backend: Backend, rng: torch.Generator, temperature: float) -> None:
    """Nothing overflows, and what is far below vanishes."""
    case = random_case(rng)
    bias = torch.tensor([1e4, -1e4, 0.0, 1e4, -1e4, 1e4]).repeat(3)
    assert_as_defined(backend, case.with_gates(bias=bias).with_rows(temperature=torch.full((9,), temperature)))


@on_all
def test_logits_that_are_not_finite_still_choose(backend: Backend, rng: torch.Generator) -> None:
    """Gates so large that logits overflow, to inf and to inf − inf."""
    case = random_case(rng)
    weight = case.gates.weight * 1e38
    weight[::2] = torch.where(torch.arange(weight.shape[1]) % 2 == 0, 3e38, -3e38)
    case.x_TK[:] = case.x_TK.abs() + 4
    y, tally = run(backend, case.with_gates(weight=weight))
    assert y.isfinite().all()
    chosen = (tally - case.routed.tally)[:, :-1]
    torch.testing.assert_close(chosen.sum(dim=1), torch.full((len(case.rows),), float(case.gates.num_gated)))


@on_all
def test_the_smallest_temperature_is_the_largest_logit(backend: Backend, rng: torch.Generator) -> None:
    """T = 1e-3: one column has all the weight, unless two are equal."""
    case = random_case(rng)
    assert_as_defined(backend, case.with_rows(temperature=torch.full((9,), 1e-3)))


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
@pytest.mark.parametrize("num_rows", [3, 40, 70])
@pytest.mark.usefixtures("ordered_dot")
def test_one_allowed_column_is_that_adapter_by_name(backend: Backend, rng: torch.Generator, num_rows: int) -> None:
    """Bit by bit, whatever k and temperature are, in decode and prefill."""
    case = random_case(rng, num_rows)
    choice = torch.arange(num_rows) % 6
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


@bit_by_bit
def test_columns_are_added_in_ascending_order(backend: Backend, rng: torch.Generator) -> None:
    """Two equal logits are a blend of two halves, the lower column first, bit by bit."""
    case = random_case(rng)
    case = replace(case, x_TK=torch.randn(case.x_TK.shape, generator=rng))
    bias = torch.tensor([1.0, 0, 7, 7, 0, 1]).repeat(3)
    equal = case.with_gates(torch.zeros_like(case.gates.weight), bias).with_rows(
        allowed=torch.ones(9, 6, dtype=torch.int32), k=ints([2] * 9), max_k=2
    )
    y, _ = run(backend, equal)
    pages = case.routed.pages[case.routed.page_indptr[2] : case.routed.page_indptr[4]].tolist()
    halves = PageList(tuple(pages), (0.5,) * len(pages))
    assert torch.equal(y, by_lists(backend, case, dict.fromkeys(case.rows, halves)))
    turned = PageList(tuple(reversed(pages)), (0.5,) * len(pages))
    assert not torch.equal(y, by_lists(backend, case, dict.fromkeys(case.rows, turned))), "the order has no effect here"


@bit_by_bit
@pytest.mark.parametrize("num_rows", [9, 70])
def test_what_is_not_finite_stays_in_its_row(backend: Backend, rng: torch.Generator, num_rows: int) -> None:
    """A row of NaN, and one whose adapter holds inf."""
    case = random_case(rng, num_rows)
    allowed = case.routed.allowed.clone()
    allowed[:, 0], allowed[:, 4] = 1, 0
    allowed[5] = torch.eye(6)[4]
    case = case.with_rows(allowed=allowed)
    expected, expected_tally = run(backend, case)
    case.x_TK[case.rows[3]] = float("nan")
    case.pages.b[case.routed.pages[case.routed.page_indptr[4]]] = float("inf")
    y, tally = run(backend, case)
    assert not y[case.rows[5]].isfinite().any()
    others = torch.ones(len(y), dtype=torch.bool)
    others[[case.rows[3], case.rows[5]]] = False
    assert torch.equal(y[others], expected[others])
    assert torch.equal(tally[torch.arange(num_rows) != 3], expected_tally[torch.arange(num_rows) != 3])


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

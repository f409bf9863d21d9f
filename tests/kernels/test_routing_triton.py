"""What the Triton kernels of routed linears promise beyond `test_routing`."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from perseid_kernels.gate import Choice, choose
from perseid_kernels.routed_lora import add_chosen, choose_config
from perseid_kernels.segments import PAGE_RANK
from perseid_kernels.triton_backend import TritonBackend
from tests.kernels.cases import DEVICE
from tests.kernels.routing_cases import (
    SLICES,
    Case,
    assert_answer,
    assert_as_defined,
    ints,
    on_device,
    random_case,
    run,
)


def choice_of(case: Case) -> Choice:
    """The gates' choice alone, on the CPU."""
    on = on_device(case)
    choice = choose(on.x_TK, on.gates, on.routed)
    return Choice(choice.columns.cpu(), choice.weights.cpu())


def test_few_rows_that_choose_the_same_of_many_columns(triton_backend: TritonBackend, rng: torch.Generator) -> None:
    """The shrink goes over the places of rows and not over columns: the first row that chose a column does it."""
    case = random_case(rng, 5, (*[9] * 64, 0), num_inputs=64, slices=(24, 8), gated=(True, True))
    allowed = torch.zeros_like(case.routed.allowed)
    allowed[:, :7] = allowed[:, -1] = 1
    case = case.with_rows(allowed=allowed, k=ints([4, 1, 2, 3, 4]), max_k=4)
    chosen = choice_of(case).columns[:, 0]
    assert chosen[chosen >= 0].unique().numel() < (chosen >= 0).sum(), "rows choose the same columns"
    assert_as_defined(triton_backend, case)


def test_ties_go_to_the_lowest_column_and_missing_places_are_marked(rng: torch.Generator) -> None:
    """Logits by hand: columns 1, 3, 4 are equal, 2 is the best; k of 3, of 1, and of 4 with two allowed."""
    case = random_case(rng, 4, num_inputs=16, slices=(8, 8), gated=(True, False))
    weight = torch.zeros_like(case.gates.weight)
    weight[:6, 0] = torch.tensor([0.0, 2, 5, 2, 2, 1])
    case.x_TK[:, 0] = 1
    case.routed.table.absolute.zero_()
    allowed = torch.ones(4, 6, dtype=torch.int32)
    allowed[2], allowed[3, 2] = ints([1, 0, 0, 0, 0, 1]), 0
    case = case.with_gates(weight, torch.zeros(12)).with_rows(allowed=allowed, k=ints([3, 1, 4, 1]), max_k=4)
    choice = choice_of(case)
    assert choice.columns[:, 0].tolist() == [[1, 2, 3, -1], [2, -1, -1, -1], [0, 5, -1, -1], [1, -1, -1, -1]]
    assert (choice.columns[:, 1] == -1).all(), "a projection without gates chose"
    softmax = torch.softmax(torch.tensor([0.0, 1.0]) / case.routed.temperature[2], dim=0)
    torch.testing.assert_close(choice.weights[2, 0, :2], softmax)
    assert choice.weights[[1, 3], 0, 0].tolist() == [1.0, 1.0]


def test_projections_that_are_left_alone_are_not_read(triton_backend: TritonBackend, rng: torch.Generator) -> None:
    """By a page (`live` = 0) or by the gate set: NaN there would show, and −0 stays −0."""
    case = random_case(rng, 3, (9, 3), gated=(True, True, False))
    case = replace(case, y_TN=torch.full_like(case.y_TN, -0.0))
    case.pages.live[:, 0] = 0
    first, second, _ = SLICES
    for unread in (slice(0, PAGE_RANK), slice(2 * PAGE_RANK, None)):
        case.pages.a[:, unread] = float("nan")
    for unread in (slice(0, first), slice(first + second, None)):
        case.pages.b[:, :, unread] = float("nan")
    y, _ = run(triton_backend, case)
    y = y[case.routed.rows.long()]
    assert torch.signbit(y[:, :first]).all()
    assert torch.signbit(y[:, first + second :]).all()
    assert y[:, first : first + second].isfinite().all()
    assert (y[:, first : first + second] != 0).all()


def test_infinite_logits(triton_backend: TritonBackend, rng: torch.Generator) -> None:
    """Beyond float32 over a small temperature, and a row of NaN, which is its own loss alone."""
    case = random_case(rng, 6)
    weight = case.gates.weight.clone()
    weight[5::6] *= 1e38  # the base's column: ± 1e38 or infinity
    allowed = case.routed.allowed.clone()
    allowed[:, 5] = 1
    case = case.with_gates(weight).with_rows(allowed=allowed, temperature=torch.full((6,), 0.01))
    case.x_TK[case.rows[4]] = float("nan")
    y, tally = run(triton_backend, case)
    assert y[torch.arange(len(y)) != case.rows[4]].isfinite().all()
    assert tally.isfinite().all()
    choice = choice_of(case)
    assert ((choice.columns >= -1) & (choice.columns < 6)).all()
    torch.testing.assert_close((tally - case.routed.tally)[:, :6].sum(dim=1), torch.full((6,), 3.0))


def test_recorded_launches_serve_other_contents(triton_backend: TritonBackend, rng: torch.Generator) -> None:
    """Nothing of the step is read on the host: what was recorded follows new rows, columns and pages."""
    case, other = (random_case(rng, 3, (16, 24, 0, 9), 32, (8, 4), (True, True)) for _ in range(2))
    only_base = torch.eye(4, dtype=torch.int32)[2].expand(3, 4).contiguous()
    case = replace(case.with_rows(allowed=only_base, max_k=6), y_TN=torch.zeros_like(case.y_TN))
    other = replace(other.with_rows(max_k=6), gates=case.gates, pages=case.pages, y_TN=case.y_TN)
    on = on_device(case)
    replay = triton_backend.record(
        lambda: triton_backend.add_routed(on.x_TK, on.gates, on.pages, on.routed, on.y_TN),
    )
    assert (on.y_TN == 0).all()
    for name in ("rows", "k", "temperature", "allowed", "pages", "page_indptr", "tally"):
        getattr(on.routed, name).copy_(getattr(other.routed, name))
    on.routed.table.absolute.copy_(other.routed.table.absolute)
    on.x_TK.copy_(other.x_TK)
    replay()
    assert_answer(other, on.y_TN.cpu(), on.routed.tally.cpu())


def test_nothing_is_read_back(
    triton_backend: TritonBackend, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read on the host would wait for the device, and could not be recorded."""
    case = random_case(rng, 2, (9, 0), 32, (8,), (True,))
    on = on_device(case)

    def refuse(*_args: object) -> None:
        raise AssertionError("read back from the device")

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
        monkeypatch.setattr(Tensor, name, refuse)
    triton_backend.add_routed(on.x_TK, on.gates, on.pages, on.routed, on.y_TN)
    monkeypatch.undo()
    assert_answer(case, on.y_TN.cpu(), on.routed.tally.cpu())


def test_no_rows_do_nothing(triton_backend: TritonBackend, rng: torch.Generator) -> None:
    case = random_case(rng, 1, (9, 0), 32, (8,), (True,))
    none = {name: getattr(case.routed, name)[:0] for name in ("rows", "k", "temperature", "allowed", "tally")}
    y, _ = run(triton_backend, case.with_rows(**none))
    assert torch.equal(y, case.y_TN)


def test_the_expand_adds_once_in_the_order_of_columns(rng: torch.Generator) -> None:
    """A choice by hand: float32 sums in ascending columns, then one addition to out."""
    case = random_case(rng, 1, (1, 1, 1), 16, (16,), (True,))
    case.x_TK.zero_()
    case.x_TK[case.rows[0], 0] = 1
    case.pages.a.zero_()
    case.pages.b.zero_()
    case.pages.a[:, 0, 0] = 1
    case.pages.live.fill_(1)
    big = 2.0**24
    case.pages.b[case.routed.pages.long(), 0] = torch.tensor([big, 1.0, -big])[:, None]
    on = on_device(case.with_rows(max_k=3))
    on.y_TN.fill_(3.0)
    choice = Choice(ints([[[0, 1, 2]]]).to(DEVICE), torch.ones(1, 1, 3, device=DEVICE))
    add_chosen(on.x_TK, on.pages, on.routed, choice, on.y_TN)
    assert (on.y_TN == 3.0).all(), "(2²⁴ + 1) − 2²⁴ is 0 in float32, in this order alone"


def test_tiles_have_room_for_what_rows_choose() -> None:
    """Few rows have expand programs of their own, and those that choose many columns; splits follow K alone."""
    assert choose_config(1, 4096, 2).expand_rows == choose_config(64, 4096, 8).expand_rows == 1
    assert choose_config(65, 4096, 2).expand_rows == choose_config(65, 4096, 32).shrink_rows == 64
    assert choose_config(2048, 4096, 33).expand_rows == choose_config(2048, 4096, 512).expand_rows == 1
    for rows in (1, 33, 65, 2048):
        assert choose_config(rows, 4096, 2).shrink.splits == 4

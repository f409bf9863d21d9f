"""Simulated acceptance: the published table, and what a budget takes by it."""

from itertools import pairwise

import pytest

from perseid_kernels.bench.expected import (
    EXPECTED,
    MARGIN,
    chosen_rows,
    expected_tokens,
    shares,
    speed_up,
    tokens_of_step,
)

FREE = {2: 1.0, 4: 1.0, 16: 1.0, 64: 1.0}


def test_the_table_is_met_and_lines_lie_between() -> None:
    assert [expected_tokens(drafts) for drafts in EXPECTED] == pytest.approx(list(EXPECTED.values()))
    assert expected_tokens(2) == pytest.approx(1.705)
    gains = [expected_tokens(drafts + 1) - expected_tokens(drafts) for drafts in range(63)]
    assert all(after <= before + 1e-12 for before, after in pairwise(gains)), "likeliest first"
    with pytest.raises(ValueError, match="64 drafts: the table tells of 0 to 63"):
        expected_tokens(64)


def test_rows_are_shared_out_among_sequences() -> None:
    assert shares(11, 4) == [3, 3, 3, 2]
    assert tokens_of_step(4, 4) == 4.0
    assert tokens_of_step(2, 5) == pytest.approx(1.56 + 1.705)


def test_a_speed_up_is_tokens_by_time_with_the_heads() -> None:
    assert speed_up(1, 16, seconds=1.2, heads=0.1, plain=1.0) == pytest.approx(2.21 / 1.3)
    assert speed_up(8, 16, seconds=2.0, heads=0.0, plain=1.0) == pytest.approx(1.56 / 2)


def test_where_rows_are_free_the_most_are_chosen() -> None:
    assert chosen_rows(1, FREE, heads=0.0, plain=1.0) == 64


def test_more_rows_have_to_pay_for_their_time() -> None:
    assert chosen_rows(1, {4: 1.0, 16: 1.1, 64: 1.5}, heads=0.05, plain=1.0) == 16
    assert chosen_rows(1, {4: 1.0, 16: 1.3, 64: 1.5}, heads=0.05, plain=1.0) == 4


def test_none_are_chosen_where_none_pay() -> None:
    assert chosen_rows(64, {128: 1.56 * 1.01}, heads=0.0, plain=1.0) == 64
    just = 1.56 / MARGIN
    assert chosen_rows(64, {128: just * 1.001}, heads=0.0, plain=1.0) == 64, "within the margin"
    assert chosen_rows(64, {128: just * 0.999}, heads=0.0, plain=1.0) == 128
    assert chosen_rows(64, {128: just * 0.999}, heads=0.2, plain=1.0) == 64, "what is won does not pay for the heads"


def test_a_tree_of_its_root_alone_is_no_draft() -> None:
    assert chosen_rows(1, {1: 0.5}, heads=0.0, plain=1.0) == 1
    assert chosen_rows(2, {2: 0.5, 4: 3.0}, heads=0.0, plain=1.0) == 2

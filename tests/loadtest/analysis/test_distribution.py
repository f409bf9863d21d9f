"""Percentiles and Jain's index, against values by hand and what holds for any values."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseid_loadtest.analysis.distribution import Distribution, jain_index

TIMES = st.lists(st.floats(0, 1e6), min_size=1, max_size=60)


def test_percentiles_lie_on_the_line_between_neighbours():
    found = Distribution.of([4.0, 1.0, 3.0, 2.0])
    assert (found.count, found.mean, found.p50, found.max) == (4, 2.5, 2.5, 4.0)
    assert found.p90 == pytest.approx(3.7)  # rank 2.7 of 0…3
    assert found.p99 == pytest.approx(3.97)


def test_one_value_is_all_of_them():
    assert Distribution.of([0.25]) == Distribution(1, 0.25, 0.25, 0.25, 0.25, 0.25)


def test_no_values_have_no_distribution():
    assert Distribution.of([]) is None
    assert Distribution.of([float("nan"), float("inf")]) is None


def test_what_is_not_finite_is_left_out():
    assert Distribution.of([1.0, float("nan"), 3.0]) == Distribution.of([1.0, 3.0])


@given(TIMES)
def test_percentiles_are_ordered_and_within_the_values(values):
    found = Distribution.of(values)
    assert min(values) <= found.p50 <= found.p90 <= found.p99 <= found.max == max(values)
    assert min(values) <= found.mean <= max(values)
    assert sum(value <= found.p50 * (1 + 1e-9) for value in values) >= len(values) / 2


@pytest.mark.parametrize(
    ("values", "index"),
    [([1, 1, 1], 1.0), ([1, 0, 0, 0], 0.25), ([1, 3], 16 / 20), ([0, 0], 1.0), ([1e-200, 3e-200], 0.8)],
)
def test_jain_by_hand(values, index):
    assert jain_index(values) == pytest.approx(index)


@pytest.mark.parametrize("values", [[], [3.0], [3.0, float("nan")]])
def test_fewer_than_two_are_not_compared(values):
    assert jain_index(values) is None


@given(st.lists(st.floats(0, 1e9), min_size=2, max_size=40), st.floats(0.01, 100))
def test_jain_lies_between_one_nth_and_one_whatever_the_unit(values, scale):
    index = jain_index(values)
    assert 1 / len(values) - 1e-9 <= index <= 1.0
    if min(values) > 1e-200:
        assert math.isclose(index, jain_index([value * scale for value in values]), rel_tol=1e-9)

"""What steps take: interpolated, and brought up to date."""

import random

import pytest

from perseid_server.speculation.budget import best_count
from perseid_server.speculation.step_clock import StepClock

MEASURED = {1: 2.4, 2: 2.6, 4: 3.9, 8: 6.2}


def test_between_measured_points_lies_a_line() -> None:
    clock = StepClock(MEASURED)
    for trees in (False, True):
        assert clock.seconds(2, trees=trees) == 2.6
        assert clock.seconds(3, trees=trees) == pytest.approx(3.25)
        assert clock.seconds(16, trees=trees) == pytest.approx(10.8), "as from 4 to 8"


def test_more_rows_take_no_less() -> None:
    assert StepClock({1: 2.0, 2: 1.5, 4: 3.0}).seconds(2, trees=False) == 2.0


def test_one_point_is_a_constant() -> None:
    assert StepClock({1: 2.0}).seconds(40, trees=True) == 2.0


def test_a_slower_machine_slows_everything() -> None:
    clock = StepClock(MEASURED)
    for _ in range(100):
        clock.saw(2, 5.2, trees=True)
    assert clock.seconds(2, trees=True) == pytest.approx(5.2, rel=0.05)
    assert clock.seconds(1, trees=False) == pytest.approx(4.8, rel=0.4), "though only trees were seen"


def test_trees_may_cost_more_than_plain_steps() -> None:
    clock = StepClock(MEASURED)
    for _ in range(400):
        clock.saw(1, 2.4, trees=False)
        clock.saw(4, 7.8, trees=True)
    assert clock.seconds(1, trees=False) == pytest.approx(2.4, rel=0.1)
    assert clock.seconds(4, trees=True) == pytest.approx(7.8, rel=0.1)
    assert clock.seconds(4, trees=False) < 0.8 * clock.seconds(4, trees=True), "which was not seen"


def test_each_kind_may_have_been_measured_by_itself() -> None:
    """Trees have other sizes, and take longer where they have the same."""
    clock = StepClock({1: 2.0, 64: 2.5}, {2: 3.0, 16: 3.0, 17: 3.2, 32: 3.2})
    assert [clock.seconds(rows, trees=False) for rows in (1, 64)] == [2.0, 2.5]
    assert [clock.seconds(rows, trees=True) for rows in (2, 9, 16, 17, 32)] == [3.0, 3.0, 3.0, 3.2, 3.2]
    assert clock.seconds(1, trees=True) == 3.0
    for _ in range(200):
        clock.saw(9, 3.9, trees=True)
    assert clock.seconds(16, trees=True) == pytest.approx(3.9, rel=0.1)
    assert clock.seconds(64, trees=False) > 2.5, "the pace is in common"


def test_one_outlier_does_little() -> None:
    clock = StepClock(MEASURED)
    clock.saw(1, 1000.0, trees=False)
    assert clock.seconds(1, trees=False) < 2.4 * 1.15


def test_noise_does_not_drift() -> None:
    clock, source = StepClock(MEASURED), random.Random(0)
    for _ in range(5000):
        rows = source.choice(list(MEASURED))
        clock.saw(rows, MEASURED[rows] * source.uniform(0.8, 1.2), trees=source.random() < 0.5)
    for rows, seconds in MEASURED.items():
        assert clock.seconds(rows, trees=False) == pytest.approx(seconds, rel=0.15)


def test_more_rows_never_take_less() -> None:
    """Also after measurements that say so, and beyond all that was measured."""
    clock = StepClock(dict.fromkeys((1, 2, 4, 8, 16, 32, 48, 64), 20.0))
    for _ in range(3000):
        clock.saw(48, 30.0, trees=False)
    assert clock.seconds(256, trees=False) >= clock.seconds(64, trees=False) >= clock.seconds(48, trees=False) > 25.0
    for _ in range(3000):
        clock.saw(320, 25.0, trees=False)
    seconds = [clock.seconds(rows, trees=False) for rows in range(1, 2049, 7)]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0.0


def test_what_lies_beyond_the_last_point_is_learned() -> None:
    """Two points that were measured alike, of a base whose rows are not free."""
    clock = StepClock({1: 0.305, 2: 0.300})
    for _ in range(2000):
        clock.saw(1, 0.3, trees=False)
        clock.saw(41, 1.1, trees=True)
    assert clock.seconds(41, trees=True) == pytest.approx(1.1, rel=0.1)
    assert best_count(clock, 1, [0.012] * 40) == 0


@pytest.mark.parametrize("measured", [{}, {1: 0.0}])
def test_a_clock_has_to_be_set(measured: dict[int, float]) -> None:
    with pytest.raises(ValueError, match="set by one measured step"):
        StepClock(measured)
    with pytest.raises(ValueError, match="set by one measured step"):
        StepClock(MEASURED, measured)

"""Retry-After follows what waits and how fast it went lately, within bounds."""

import pytest

from perseid_server.frontend.drain_rate import FIRST_GUESS_S, LONGEST_S, SHORTEST_S, DrainRate


class Clock:
    """Stands until it is moved."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def busy(clock: Clock, draw: float = 0.5) -> DrainRate:
    rate = DrainRate(clock, lambda: draw)
    rate.begin()
    return rate


def test_a_steady_rate_is_found_from_the_beginning(clock: Clock) -> None:
    rate = busy(clock)
    for _ in range(50):
        clock.now += 0.1
        rate.left(10)
    assert rate.tokens_per_s == pytest.approx(100, rel=0.02)
    assert rate.retry_after_s(1000) == pytest.approx(5, rel=0.02)


def test_what_was_long_ago_counts_little(clock: Clock) -> None:
    rate = busy(clock)
    clock.now += 20.0
    rate.left(1000)
    before = rate.tokens_per_s
    clock.now += 100.0
    assert rate.tokens_per_s < 0.01 * before


def test_before_anything_has_left_it_is_a_guess(clock: Clock) -> None:
    assert DrainRate(clock, lambda: 0.5).retry_after_s(10**9) == FIRST_GUESS_S


def test_it_is_bounded_whatever_is_drawn(clock: Clock) -> None:
    for draw in (0.0, 0.999):
        rate = busy(clock, draw)
        rate.left(10)
        assert rate.retry_after_s(10**9) == LONGEST_S
        assert rate.retry_after_s(1) == SHORTEST_S


def test_those_refused_together_do_not_come_back_together(clock: Clock) -> None:
    rate = DrainRate(clock)
    rate.left(1000)
    told = {rate.retry_after_s(20_000) for _ in range(20)}
    assert len(told) > 10
    assert max(told) < 1.4 * min(told)


def test_idle_time_says_nothing_of_how_fast_it_goes(clock: Clock) -> None:
    rate = busy(clock)
    for _ in range(50):
        clock.now += 0.1
        rate.left(10)
    before = rate.tokens_per_s
    rate.rest()
    clock.now += 600.0
    assert rate.tokens_per_s == before
    rate.begin()
    rate.begin()
    assert rate.retry_after_s(1000) == pytest.approx(5, rel=0.02)
    clock.now += 100.0  # and now nothing leaves, though it could
    assert rate.tokens_per_s < 0.01 * before

"""Rates, quotas, and what is told of them."""

import contextlib

import pytest

from perseid_server.access.caller import ANYONE
from perseid_server.access.keys import Allowance
from perseid_server.access.ledger import DAY_S, Ledger
from perseid_server.access.limits import Limiter, QuotaSpent, _span
from perseid_server.errors import QueueFull, RateLimited
from tests.server.access.rings import key


class Clock:
    """Stands still until it is set."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def refused(limiter: Limiter, one) -> RateLimited:
    with pytest.raises(RateLimited) as caught:
        limiter.count_request(one)
    return caught.value


def test_requests_come_back_at_an_even_rate(clock: Clock) -> None:
    limiter, one = Limiter(clock=clock), key("a", allowance=Allowance(requests_per_minute=2))
    limiter.count_request(one)
    limiter.count_request(one)
    assert refused(limiter, one).retry_after_s == pytest.approx(30)
    clock.now += 29.9
    assert refused(limiter, one).retry_after_s == pytest.approx(0.1)
    clock.now += 0.1
    limiter.count_request(one)
    clock.now += 3600
    assert limiter.headers("a")["x-ratelimit-remaining-requests"] == "2"  # no more than fits in


def test_a_clock_that_goes_back_gives_nothing(clock: Clock) -> None:
    limiter, one = Limiter(clock=clock), key("a", allowance=Allowance(requests_per_minute=1))
    limiter.count_request(one)
    clock.now -= 500
    refused(limiter, one)
    clock.now += 500
    assert refused(limiter, one).retry_after_s == pytest.approx(60)


def test_tokens_of_an_answer_are_taken_as_they_come_and_have_to_come_back(clock: Clock) -> None:
    limiter, one = Limiter(clock=clock), key("a", allowance=Allowance(tokens_per_minute=60))
    limiter.count_request(one)
    with limiter.metered(one.caller, 10) as meter:
        meter.spend(100)
    assert limiter.headers("a")["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(RateLimited) as caught, limiter.metered(one.caller, 10):
        pytest.fail("it may not run")
    assert caught.value.retry_after_s == pytest.approx(60)  # 50 too many, and 10 for this prompt


def test_a_prompt_longer_than_the_limit_waits_for_a_full_bucket(clock: Clock) -> None:
    limiter, one = Limiter(clock=clock), key("a", allowance=Allowance(tokens_per_minute=60))
    limiter.count_request(one)
    with limiter.metered(one.caller, 600):
        pass
    with pytest.raises(RateLimited) as caught, limiter.metered(one.caller, 600):
        pass
    assert caught.value.retry_after_s == pytest.approx(600)


def test_what_the_server_refuses_costs_nothing(clock: Clock) -> None:
    limiter, one = Limiter(clock=clock), key("a", allowance=Allowance(tokens_per_minute=60, tokens_total=60))
    limiter.count_request(one)
    with pytest.raises(QueueFull), limiter.metered(one.caller, 50):
        raise QueueFull("full")
    with pytest.raises(ValueError), limiter.metered(one.caller, 50):  # a client that leaves does pay
        raise ValueError
    assert limiter.ledger.used("a").total == 50


def test_a_prompt_of_yesterday_is_not_given_back_today(clock: Clock) -> None:
    wall = Clock()
    wall.now = 10 * DAY_S - 1.0
    allowance = Allowance(tokens_per_day=100, tokens_per_minute=100)
    limiter, one = Limiter(Ledger(wall=wall), clock), key("a", allowance=allowance)
    limiter.count_request(one)
    with contextlib.suppress(QueueFull), limiter.metered(one.caller, 50):
        wall.now += 1
        with limiter.metered(one.caller, 30):
            pass
        raise QueueFull("full")
    used = limiter.ledger.used("a")
    assert (used.total, used.today) == (30, 30)
    assert limiter.headers("a")["x-ratelimit-remaining-tokens"] == "70"


def test_a_day_ends_and_a_total_does_not(clock: Clock) -> None:
    wall = Clock()
    wall.now = 10 * DAY_S + 100.0
    limiter = Limiter(Ledger(wall=wall), clock)
    daily, total = key("d", allowance=Allowance(tokens_per_day=10)), key("t", allowance=Allowance(tokens_total=10))
    reasons: list[str] = []
    limiter.on_refusal(reasons.append)
    for one in (daily, total):
        limiter.count_request(one)
        with limiter.metered(one.caller, 10):
            pass
        with pytest.raises(QuotaSpent) as caught, limiter.metered(one.caller, 1):
            pass
        assert caught.value.retry_after_s == (DAY_S - 100 if one is daily else DAY_S)
    assert reasons == ["quota", "quota"]
    wall.now -= DAY_S  # set back: the day stays spent
    with pytest.raises(QuotaSpent), limiter.metered(daily.caller, 1):
        pass
    wall.now += 2 * DAY_S
    with limiter.metered(daily.caller, 10):
        pass
    with pytest.raises(QuotaSpent), limiter.metered(total.caller, 1):
        pass


@pytest.mark.parametrize("ahead_days", [1, 365])
def test_a_clock_that_was_ahead_for_a_moment_locks_nobody_out(clock: Clock, ahead_days: int) -> None:
    wall = Clock()
    wall.now = 10 * DAY_S + 100.0
    limiter, one = Limiter(Ledger(wall=wall), clock), key("d", allowance=Allowance(tokens_per_day=10))
    limiter.count_request(one)
    with limiter.metered(one.caller, 10):
        pass
    wall.now += ahead_days * DAY_S
    with limiter.metered(one.caller, 10):  # another day, as far as anybody can tell
        pass
    wall.now -= ahead_days * DAY_S
    with pytest.raises(QuotaSpent) as caught, limiter.metered(one.caller, 1):
        pass
    assert caught.value.retry_after_s == DAY_S - 100
    wall.now += DAY_S
    with limiter.metered(one.caller, 10):
        pass


def test_a_limit_that_changes_forgives_nothing(clock: Clock) -> None:
    limiter = Limiter(clock=clock)
    limiter.count_request(key("a", allowance=Allowance(requests_per_minute=1)))
    limiter.count_request(key("a", allowance=Allowance(requests_per_minute=2)))
    refused(limiter, key("a", allowance=Allowance(requests_per_minute=2)))


def test_a_limit_that_changes_while_a_request_runs_forgives_nothing(clock: Clock) -> None:
    limiter = Limiter(clock=clock)
    before, after = (key("a", allowance=Allowance(tokens_per_minute=limit)) for limit in (100, 50))
    limiter.count_request(before)
    with limiter.metered(before.caller, 10) as meter:
        limiter.count_request(after)
        meter.spend(15)
    assert limiter.headers("a")["x-ratelimit-remaining-tokens"] == "25"


def test_headers_are_openais(clock: Clock) -> None:
    limiter, one = Limiter(clock=clock), key("a", allowance=Allowance(requests_per_minute=60, tokens_per_minute=100))
    for _ in range(3):
        limiter.count_request(one)
    assert limiter.headers("a") == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "57",
        "x-ratelimit-reset-requests": "3s",
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "100",
        "x-ratelimit-reset-tokens": "0ms",
    }


def test_without_a_key_nothing_is_limited() -> None:
    with Limiter().metered(ANYONE, 1 << 40) as meter:
        meter.spend(1 << 40)


def test_looking_brings_nothing_back(clock: Clock) -> None:
    limiter, one = Limiter(clock=clock), key("a", allowance=Allowance(requests_per_minute=60))
    for _ in range(60):
        limiter.count_request(one)
    for second in range(1, 11):
        clock.now += 1
        assert limiter.headers("a")["x-ratelimit-remaining-requests"] == str(second)


def test_a_limit_that_is_taken_away_limits_no_longer_and_one_that_comes_begins_full(clock: Clock) -> None:
    limiter, limited = Limiter(clock=clock), key("a", allowance=Allowance(requests_per_minute=1))
    limiter.count_request(limited)
    for _ in range(3):
        limiter.count_request(key("a"))
    assert limiter.headers("a") == {}
    limiter.count_request(limited)
    refused(limiter, limited)


def test_refusals_are_told_by_their_reason(clock: Clock) -> None:
    limiter, told = Limiter(clock=clock), []
    limiter.on_refusal(told.append)
    fast, poor = Allowance(requests_per_minute=1, tokens_per_minute=5), Allowance(tokens_total=5)
    for one in (key("fast", allowance=fast), key("poor", allowance=poor)):
        limiter.count_request(one)
        six_tokens = lambda caller=one.caller: limiter.metered(caller, 6)  # noqa: E731
        with pytest.raises(RateLimited), six_tokens(), six_tokens():  # a full bucket lets in what is larger, once
            pass
    refused(limiter, key("fast", allowance=fast))
    assert told == ["rate_limit", "quota", "rate_limit"]


def test_a_key_that_has_not_called_has_no_headers() -> None:
    assert Limiter().headers("nobody") == {}


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (-1, "0ms"),
        (0, "0ms"),
        (0.0001, "1ms"),
        (0.02, "20ms"),
        (0.9991, "1s"),
        (1, "1s"),
        (1.001, "2s"),
        (59, "59s"),
        (59.5, "1m0s"),
        (60, "1m0s"),
        (61, "1m1s"),
        (7200, "120m0s"),
    ],
)
def test_spans_are_written_as_openai_does_and_never_too_short(seconds: float, told: str) -> None:
    assert _span(seconds) == told


def test_an_answer_that_has_begun_costs_its_prompt_though_it_fails(clock: Clock) -> None:
    limiter, one = Limiter(clock=clock), key("a", allowance=Allowance(tokens_per_minute=100))
    limiter.count_request(one)
    with contextlib.suppress(QueueFull), limiter.metered(one.caller, 10) as meter:
        meter.spend(2)
        raise QueueFull("no more")
    assert limiter.ledger.used("a").total == 12
    assert limiter.headers("a")["x-ratelimit-remaining-tokens"] == "88"

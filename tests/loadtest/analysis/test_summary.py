"""The figures of runs that are known by hand."""

import math
from dataclasses import asdict

import pytest

from perseid_loadtest.analysis.rows import remarks
from perseid_loadtest.analysis.slo import Slo
from perseid_loadtest.analysis.summary import summarise
from perseid_loadtest.traffic.record import ChurnRecord
from tests.loadtest.analysis.runs import RUNS, answer, failure, run_of


@pytest.fixture
def mixed():
    return run_of(
        answer(0, 0.0, ((1.0, 1), (1.1, 1), (1.3, 1)), prompt_tokens=20, adapter="a"),
        answer(1, 2.0, ((2.5, 2), (2.9, 3)), sent=2.4, prompt_tokens=30, adapter="b"),
        failure(2, adapter="b"),
        failure(3, error="timeout", message="", adapter="c"),
        failure(4, message="other words", adapter="b"),
        answer(5, 0.0, ((9.0, 100),), warm_up=True, prompt_tokens=99),
        window_s=4.0,
    )


def test_latencies_count_from_the_planned_arrival(mixed):
    found = summarise(mixed)
    assert (found.ttft.count, found.ttft.mean, found.ttft.max) == (2, pytest.approx(0.75), 1.0)
    assert (found.itl.count, found.itl.max) == (3, pytest.approx(0.4))  # gaps between chunks: 0.1, 0.2, 0.4
    assert found.itl.mean == pytest.approx(0.7 / 3)
    assert found.tpot.mean == pytest.approx((0.3 / 2 + 0.4 / 4) / 2)  # by tokens, not by chunks
    assert found.e2e.mean == pytest.approx((1.3 + 0.9) / 2)


def test_rates_are_of_answers_without_warm_up(mixed):
    found = summarise(mixed)
    assert (found.requests, found.answered, found.failed) == (5, 2, 3)
    assert (found.offered_per_s, found.requests_per_s) == (1.25, 0.2)  # due in 4 s, answered in 10 s
    assert (found.output_tokens_per_s, found.prompt_tokens_per_s) == (0.8, 5.0)


def test_without_a_time_of_sending_no_rate_was_due():
    assert summarise(run_of(answer())).offered_per_s is None


def test_errors_by_kind_with_an_example(mixed):
    found = summarise(mixed).errors
    assert [(one.kind, one.count, one.example) for one in found] == [("429", 2, "queue full"), ("timeout", 1, "")]


def test_goodput_is_a_share_of_all_requests(mixed):
    found = summarise(mixed, Slo(ttft_s=0.7)).goodput
    assert (found.requests, found.requests_per_s, found.share) == (1, 0.1, 0.2)
    assert summarise(mixed).goodput is None


def test_adapters_the_most_asked_for_first(mixed):
    found = summarise(mixed)
    told = [(one.adapter, one.requests, one.errors, one.output_tokens, one.ttft_p50) for one in found.adapters]
    assert told == [("b", 3, 2, 5, 0.5), ("a", 1, 0, 3, 1.0), ("c", 1, 1, 0, None)]
    x, y = 1.3 / 3, 0.9 / 5  # end to end ÷ tokens; c has no answer
    assert found.jain == pytest.approx((x + y) ** 2 / (2 * (x * x + y * y)))


def test_one_adapter_is_compared_with_nothing():
    assert summarise(run_of(answer(), answer(1))).jain is None


def test_tokens_are_what_the_server_says_else_what_came():
    assert summarise(run_of(answer(output_tokens=12))).output_tokens == 12
    assert summarise(run_of(answer(chunks=((1.0, 2.5), (2.0, 2.5)), output_tokens=0))).output_tokens == 5


@pytest.mark.parametrize(
    ("busy", "late", "said"),
    [(0.5, 0.001, None), (0.9, 0.0, "90.0 % of its core"), (0.1, 0.2, "200 ms late"), (0.1, 0.09, None)],
)
def test_the_load_generator_tells_when_it_is_the_bottleneck(busy, late, said):
    found = summarise(run_of(answer(), client_busy=busy, most_late_s=late)).client  # TTFT 1 s
    assert found.verdict is None if said is None else said in found.verdict


def test_the_load_generator_tells_what_failed_in_itself():
    """As where it may open no more connections; the server has never seen such a request."""
    own = failure(1, error="client", message="cannot connect (too many open files)")
    found = summarise(run_of(answer(), own, failure(2), failure(3, error="client", warm_up=True))).client
    assert "1 of 3 requests failed in it and not in the server" in found.verdict


def test_churn_by_action():
    churn = (
        ChurnRecord("load", "x", 1.0, 1.5),
        ChurnRecord("unload", "x", 2.0, 2.1),
        ChurnRecord("load", "y", 3.0, 9.0, "409"),
    )
    load, unload = summarise(run_of(churn=churn)).churn
    assert (load.action, load.count, load.errors, load.seconds.max, load.example) == ("load", 2, 1, 0.5, "409")
    assert (unload.count, unload.errors) == (1, 0)


@pytest.mark.parametrize("name", RUNS)
def test_every_run_has_a_summary_without_nan(name):
    def finite(value):
        if isinstance(value, dict):
            return all(map(finite, value.values()))
        if isinstance(value, (list, tuple)):
            return all(map(finite, value))
        return not isinstance(value, float) or math.isfinite(value)

    assert finite(asdict(summarise(RUNS[name], Slo(ttft_s=1.0, tpot_s=1.0, itl_s=1.0, e2e_s=1.0))))


def test_an_answer_that_is_not_streamed_has_a_first_token_at_its_end_and_no_gaps():
    found = summarise(RUNS["not streamed"])
    assert (found.ttft.max, found.itl, found.tpot, found.output_tokens) == (2.0, None, None, 49)


def test_a_run_of_no_time_has_no_rates():
    found = summarise(RUNS["empty"])
    assert (found.requests_per_s, found.ttft, found.errors, found.jain) == (None, None, (), None)


def test_empty_answers_are_counted():
    assert summarise(RUNS["no arrivals"]).empty == 1


def test_answers_that_the_server_did_not_count_are_told():
    found = summarise(run_of(answer(), answer(1, tokens_told=False), answer(2, tokens_told=False, warm_up=True)))
    assert found.uncounted == 1
    assert [remark for remark in remarks(found) if "did not count the tokens of 1 of 2 answers" in remark]
    assert not [remark for remark in remarks(summarise(run_of(answer()))) if "did not count" in remark]


def test_why_the_servers_own_figures_are_missing_is_told():
    found = summarise(run_of(answer(), server_untold="http://h/metrics answers HTTP 401"))
    assert "No figures by the server: http://h/metrics answers HTTP 401." in remarks(found)
    assert not [remark for remark in remarks(summarise(run_of(answer()))) if "by the server" in remark]

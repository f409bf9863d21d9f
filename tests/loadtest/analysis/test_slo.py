"""Limits: how they are read, and who meets them."""

import pytest

from perseid_loadtest.analysis.slo import Slo
from perseid_server.errors import InvalidRequest
from tests.loadtest.analysis.runs import UNANSWERED, answer, failure


def test_limits_are_read_with_their_units():
    slo = Slo.parse(" ttft=500ms, tpot=.05s ,itl=250000us,e2e=1.5min")
    assert slo == Slo(ttft_s=0.5, tpot_s=0.05, itl_s=0.25, e2e_s=90.0)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "NAME=TIME"),
        ("ttft=1s,", "NAME=TIME"),
        ("speed=1s", "'speed=1s' is no limit; give NAME=TIME with a name of ttft, tpot, itl, e2e"),
        ("ttft", "NAME=TIME"),
        ("ttft=500", "ttft=500: expected a time with its unit"),
        ("ttft=-1s", "with its unit"),
        ("ttft=nans", "with its unit"),
        ("ttft=٥s", "with its unit"),
        ("ttft=0ms", "more than nothing"),
        ("ttft=" + "9" * 400 + "s", "more than nothing"),
        ("e2e=1s,e2e=2s", "e2e is given twice"),
    ],
)
def test_what_is_no_limit_is_told(text, told):
    with pytest.raises(InvalidRequest, match="slo: ") as caught:
        Slo.parse(text)
    assert told in caught.value.message
    assert caught.value.field == "slo"


def test_limits_are_told():
    assert Slo.parse("e2e=5s,ttft=500ms").describe() == "TTFT ≤ 500 ms, end to end ≤ 5.00 s"
    assert Slo().describe() == "no limits"


# Planned at 0, tokens at 1.0, 1.1 and 1.3: TTFT 1 s, TPOT 0.15 s, longest gap 0.2 s, end to end 1.3 s.
@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("ttft=1s", True),
        ("ttft=999ms", False),
        ("tpot=151ms", True),
        ("tpot=149ms", False),
        ("itl=201ms", True),
        ("itl=199ms", False),
        ("e2e=1300ms", True),
        ("e2e=1299ms", False),
        ("ttft=2s,e2e=1s", False),
    ],
)
def test_each_limit_holds(text, met):
    assert Slo.parse(text).met_by(answer()) is met


def test_a_late_client_is_part_of_the_wait():
    assert not Slo.parse("ttft=400ms").met_by(answer(planned=0.0, sent=0.9))


def test_no_limit_is_met_by_every_answer_and_by_no_error():
    assert Slo().met_by(answer())
    assert not Slo().met_by(failure())


def test_one_chunk_has_no_gaps_to_be_too_long():
    one = answer(chunks=((0.5, 12),))
    assert Slo.parse("tpot=1us,itl=1us,ttft=500ms").met_by(one)


def test_the_first_token_of_an_answer_without_chunks_came_by_its_end():
    told = answer(chunks=(), ended=2.0, output_tokens=7)
    assert Slo.parse("ttft=2s").met_by(told)
    assert not Slo.parse("ttft=1s").met_by(told)


def test_an_empty_answer_never_brought_a_first_token():
    assert not Slo.parse("ttft=60s").met_by(UNANSWERED)
    assert Slo.parse("e2e=60s").met_by(UNANSWERED)

"""What a sweep says of each rate, and of whose limit it found."""

import pytest

from perseid_loadtest.analysis.tried import as_json, outcome, trial_line
from perseid_loadtest.traffic.sweep import Sweep, Trial
from tests.loadtest.analysis.runs import answer, run_of

BUSY = "the load generator may be the bottleneck: it used 95.0 % of its core"


def trial(rate: float, met: bool, *, busy: float = 0.1, stopped: str | None = None) -> Trial:
    return Trial(rate, 1.0 if met else 0.5, met, run_of(answer(), client_busy=busy, stopped_early=stopped))


@pytest.mark.parametrize(
    ("tried", "line"),
    [
        (trial(2.0, met=True), "       2 requests a second: 100.0% good, met"),
        (trial(640.0, met=False), "     640 requests a second:  50.0% good, not met"),
        (trial(640.0, met=False, busy=0.95), f"     640 requests a second:  50.0% good, not met; {BUSY}"),
        (trial(2.0, met=True, busy=0.95), f"       2 requests a second: 100.0% good, met; {BUSY}"),
        (
            trial(2.0, met=False, stopped="\x1b[31m all failed"),
            "       2 requests a second:  50.0% good, not met; stopped early: [31m all failed",
        ),
    ],
)
def test_a_line_tells_whose_limit_it_may_be(tried: Trial, line: str):
    assert trial_line(tried) == line


def test_the_outcome_does_not_blame_the_server_for_a_busy_load_generator():
    good, bad, busy = trial(2.0, met=True), trial(3.0, met=False), trial(3.0, met=False, busy=0.95)
    far = trial(9.0, met=False, busy=0.95)
    found = "the highest rate that met the limits: 2 requests a second"
    perhaps = "at 3 a second the load generator may have been the bottleneck, so that the server may do more"
    assert outcome(Sweep((good, bad))) == found
    assert outcome(Sweep((good, far, bad))) == found  # the server's limit was found below
    assert outcome(Sweep((good, far, busy))) == f"{found}; {perhaps}"
    nothing = "no rate met the limits; the lowest tried was 3 a second"
    assert outcome(Sweep((far, bad))) == nothing
    assert outcome(Sweep((far, busy))) == f"{nothing}; {perhaps}"


def test_the_file_has_it_too():
    told = as_json(Sweep((trial(2.0, met=True), trial(3.0, met=False, busy=0.95, stopped="errors"))))
    assert told == [
        {"rate": 2.0, "good_share": 1.0, "met": True},
        {"rate": 3.0, "good_share": 0.5, "met": False, "notes": ["stopped early: errors", BUSY]},
    ]

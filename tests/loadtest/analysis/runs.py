"""Runs whose figures are known by hand."""

from perseid_loadtest.drive import Arrival
from perseid_loadtest.traffic.record import RequestRecord, Run


def answer(number=0, planned=0.0, chunks=((1.0, 1), (1.1, 1), (1.3, 1)), *, sent=None, ended=None, **more):
    """A request answered by (moment, tokens)."""
    arrivals = tuple(Arrival(moment, tokens) for moment, tokens in chunks)
    last = chunks[-1][0] if chunks else planned
    more.setdefault("output_tokens", sum(tokens for _, tokens in chunks))
    return RequestRecord(
        number,
        more.pop("adapter", ""),
        planned,
        planned if sent is None else sent,
        last if ended is None else ended,
        arrivals,
        **more,
    )


def failure(number=0, planned=0.0, ended=1.0, error="429", message="queue full", adapter="", **more):
    return RequestRecord(number, adapter, planned, planned, ended, error=error, message=message, **more)


def run_of(*records, seconds=10.0, **more):
    options = more.pop("options", {"rate": 2.0, "popularity": "zipf:1.0"})
    return Run("http://127.0.0.1:8000", options, 1_700_000_000.0, seconds, tuple(records), **more)


UNANSWERED = answer(chunks=(), ended=2.0)
"""Ended well, and empty."""

RUNS = {
    "empty": run_of(seconds=0.0),
    "no records": run_of(),
    "errors alone": run_of(failure(), failure(1, error="timeout", message="", adapter="a"), stopped_early="errors"),
    "one token": run_of(answer(chunks=((0.5, 1),))),
    "not streamed": run_of(answer(chunks=((2.0, 40),), streamed=False), answer(1, 1.0, ((2.0, 9),), streamed=False)),
    "no arrivals": run_of(answer(chunks=(), ended=2.0, output_tokens=7), UNANSWERED),
    "all at one moment": run_of(answer(chunks=((0.0, 1), (0.0, 1)))),
    "warm-up alone": run_of(answer(warm_up=True), failure(warm_up=True)),
    "not measured": run_of(answer(), client_busy=float("nan"), most_late_s=float("nan")),
}
"""What figures, files and pages have to survive."""

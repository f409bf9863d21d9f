"""What a sweep tells of the rates that it tried, and of whose limit it found: the server's or the load generator's."""

from collections.abc import Sequence
from typing import Any

from perseid_loadtest.analysis import formatting
from perseid_loadtest.analysis.summary import summarise
from perseid_loadtest.traffic.sweep import Sweep, Trial


def trial_line(trial: Trial) -> str:
    """One rate, and what to know before trusting it."""
    verdict = "met" if trial.met else "not met"
    line = f"{trial.rate:8.3g} requests a second: {trial.good_share:6.1%} good, {verdict}"
    return "; ".join([line, *_notes(trial)])


def outcome(sweep: Sweep) -> str:
    """The highest rate. It is the server's only where the next one above did not fail for the load generator."""
    failed = min((trial for trial in sweep.trials if not trial.met), key=lambda trial: trial.rate, default=None)
    if sweep.best is not None:
        found = f"the highest rate that met the limits: {sweep.best.rate:.3g} requests a second"
    else:
        found = f"no rate met the limits; the lowest tried was {min(one.rate for one in sweep.trials):.3g} a second"
    if failed is None or _client_verdict(failed) is None:
        return found
    doubt = "the load generator may have been the bottleneck, so that the server may do more"
    return f"{found}; at {failed.rate:.3g} a second {doubt}"


def as_json(sweep: Sweep) -> Sequence[dict[str, Any]]:
    """All rates, for the options of the run that is reported."""
    return [
        {"rate": trial.rate, "good_share": trial.good_share, "met": trial.met}
        | ({"notes": notes} if (notes := _notes(trial)) else {})
        for trial in sweep.trials
    ]


def _notes(trial: Trial) -> list[str]:
    stopped, verdict = trial.run.stopped_early, _client_verdict(trial)
    return [
        *([f"stopped early: {formatting.printable(stopped)}"] if stopped is not None else []),
        *([verdict[0].lower() + verdict[1:].rstrip(".")] if verdict is not None else []),
    ]


def _client_verdict(trial: Trial) -> str | None:
    return summarise(trial.run).client.verdict

"""The sweep finds the capacity of a simulated server: one that serves C requests a second in the order they came."""

import random

import pytest

from perseid_loadtest.drive import Arrival
from perseid_loadtest.traffic.arrivals import Gamma
from perseid_loadtest.traffic.record import RequestRecord, Run
from perseid_loadtest.traffic.sweep import find_highest_rate, good_share
from perseid_loadtest.traffic.tally import INTERRUPTED

LIMIT_S = 0.5


def simulated(rate: float, capacity: float, trial: int, stopped: str | None = None) -> Run:
    free, records = 0.0, []
    for number, due in enumerate(Gamma(rate, 100.0).due(random.Random(trial))):
        if due.at > 60.0:
            break
        free = max(free, due.at) + 1.0 / capacity
        records.append(RequestRecord(number, "", due.at, due.at, free, (Arrival(free, 1),)))
    return Run("simulated", {}, 0.0, 60.0, tuple(records), stopped_early=stopped)


def met_by(record: RequestRecord) -> bool:
    return record.error is None and record.latency <= LIMIT_S


@pytest.mark.parametrize(("capacity", "start"), [(10.0, 1.0), (10.0, 64.0), (37.0, 20.0), (100.0, 100.0)])
async def test_the_highest_rate_is_the_capacity(capacity: float, start: float):
    seen = []

    async def run_at(rate: float, trial: int) -> Run:
        seen.append((rate, trial))
        return simulated(rate, capacity, trial)

    sweep = await find_highest_rate(run_at, met_by, start=start)
    assert sweep.best.rate == pytest.approx(capacity, rel=0.06)
    assert [trial for _, trial in seen] == list(range(len(sweep.trials)))  # each fresh, all told
    failed = min(trial.rate for trial in sweep.trials if not trial.met)
    assert sweep.best.rate < failed <= sweep.best.rate * 1.05 + 1e-9


async def test_a_server_that_keeps_no_limit_has_no_rate():
    async def run_at(rate: float, trial: int) -> Run:
        return simulated(rate, 0.1, trial)

    sweep = await find_highest_rate(run_at, met_by, start=8.0)
    assert sweep.best is None
    assert min(trial.rate for trial in sweep.trials) == pytest.approx(8 / 64)


async def test_a_user_who_interrupts_ends_the_sweep():
    async def run_at(rate: float, trial: int) -> Run:
        return simulated(rate, 100.0, trial, INTERRUPTED if trial == 2 else None)

    sweep = await find_highest_rate(run_at, met_by, start=1.0)
    assert (len(sweep.trials), sweep.stopped_early, sweep.best.rate) == (3, INTERRUPTED, 2.0)


async def test_a_run_that_errors_ended_does_not_meet_the_limits():
    async def run_at(rate: float, trial: int) -> Run:
        return simulated(rate, 1000.0, trial, "errors" if rate >= 4 else None)

    sweep = await find_highest_rate(run_at, met_by, start=1.0)
    assert 2.0 <= sweep.best.rate < 4.0


def test_warm_up_does_not_count_and_failures_do():
    records = [
        RequestRecord(0, "", 0, 0, 9, warm_up=True),
        RequestRecord(1, "", 0, 0, 0.1),
        RequestRecord(2, "", 0, 0, 0.1, error="503"),
    ]
    assert good_share(records, met_by) == 0.5
    assert good_share([], met_by) == 0.0

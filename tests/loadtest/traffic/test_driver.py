"""Every request that was due has exactly one record, and its wait counts from when it was due."""

import asyncio
import itertools
import re
import time
from dataclasses import replace

import pytest

from perseid_loadtest.traffic import driver as driving
from perseid_loadtest.traffic.arrivals import Due, Gamma, Trace
from perseid_loadtest.traffic.driver import Driver, Limits, lateness_p99
from perseid_loadtest.traffic.record import RequestRecord
from perseid_loadtest.traffic.session import Session
from perseid_loadtest.traffic.tally import Stop, Tally
from perseid_loadtest.traffic.target import Failed
from perseid_server.errors import InvalidRequest
from tests.loadtest.traffic.fake_target import FakeTarget, plan

EVERY = Trace(tuple(Due(0.01 * number) for number in range(40)))


async def drive(target, limits: Limits, arrivals=None, stop: Stop | None = None) -> list[RequestRecord]:
    driver = Driver(target, plan(arrivals), limits, stop or Stop(), Tally())
    await driver.run()
    numbers = sorted(record.number for record in driver.records)
    assert numbers == list(range(len(numbers)))  # each once
    return sorted(driver.records, key=lambda record: record.number)


async def test_an_open_loop_does_not_wait_for_answers():
    target = FakeTarget(lambda _: asyncio.sleep(0.5))
    records = await drive(target, Limits(), EVERY)
    assert target.most_running == len(EVERY.moments)
    assert all(record.error is None and record.output_tokens == 2 for record in records)
    assert [record.planned for record in records] == [due.at for due in EVERY.moments]


async def test_the_wait_counts_from_the_planned_arrival_when_all_stalls():
    """The whole event loop stands still, as a client does that is kept from its core: requests that were due meanwhile
    were sent late, and must not look fast (coordinated omission)."""

    async def stall(request):
        if request.number == 5:
            time.sleep(0.3)  # noqa: ASYNC251  that is the point

    records = await drive(FakeTarget(stall), Limits(), EVERY)
    during = records[6:20]  # due up to 0.15 s after the stall began
    assert all(record.ttft >= record.sent - record.planned > 0.05 for record in during)
    assert all(record.latency >= 0.3 - 0.01 * place - 0.05 for place, record in enumerate(during, 1))
    assert lateness_p99(records) > 0.2


async def test_the_wait_counts_from_the_planned_arrival_when_the_server_stalls():
    open_again = asyncio.Event()

    async def closed_at_first(request):
        if request.number == 0:
            await asyncio.sleep(0.3)
            open_again.set()
        await open_again.wait()

    records = await drive(FakeTarget(closed_at_first), Limits(), EVERY)
    assert len(records) == 40
    waited = [record for record in records if record.planned < 0.2]
    assert all(record.ttft > 0.09 for record in waited)  # not only the one request that stalled


async def test_a_closed_loop_has_one_request_for_each_client():
    target = FakeTarget(lambda _: asyncio.sleep(0.005))
    records = await drive(target, Limits(concurrency=3, requests=20))
    assert (target.most_running, len(records)) == (3, 20)
    assert not any(record.warm_up for record in records)


async def test_warm_up_comes_before_the_requests_that_count():
    limits = Limits(warm_up_s=0.105, requests=10)
    records = await drive(FakeTarget(), limits, EVERY)
    assert [record.warm_up for record in records] == [True] * 11 + [False] * 10
    closed = await drive(FakeTarget(lambda _: asyncio.sleep(0.01)), Limits(warm_up_s=0.05, requests=7, concurrency=2))
    assert sum(not record.warm_up for record in closed) == 7
    assert all(record.warm_up == (record.planned < 0.05) for record in closed)


async def test_a_duration_ends_both_loops_and_waits_for_what_runs():
    target = FakeTarget(lambda _: asyncio.sleep(0.03))
    for limits, arrivals in ((Limits(duration_s=0.1), EVERY), (Limits(duration_s=0.1, concurrency=2), None)):
        records = await drive(target, limits, arrivals)
        assert all(record.planned < 0.1 and record.error is None for record in records)
        assert records


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (Failed("429", "too many", 2.0), "429", "too many"),
        (Failed("UNAVAILABLE", "away"), "UNAVAILABLE", "away"),
        (ZeroDivisionError("oh"), "client", "ZeroDivisionError: oh"),
    ],
)
async def test_failures_are_records_by_kind(raised, kind, message):
    async def fail(request):
        if request.number % 2:
            raise raised

    records = await drive(FakeTarget(fail), Limits(requests=6), EVERY)
    assert [record.error for record in records] == [None, kind] * 3
    assert records[1].message == message
    assert records[1].retry_after_s == getattr(raised, "retry_after_s", None)


async def test_an_answer_that_takes_too_long_is_a_timeout():
    records = await drive(FakeTarget(lambda _: asyncio.sleep(60)), Limits(requests=3, timeout_s=0.05), EVERY)
    assert [record.error for record in records] == ["timeout"] * 3


async def test_many_errors_stop_the_run():
    async def fail(request):
        if request.number >= 10:
            raise Failed("503")

    stop = Stop()
    records = await drive(FakeTarget(fail), Limits(stop_on_errors=0.5), Gamma(2000.0), stop)
    assert "503" in stop.reason
    assert 20 <= len(records) < 1000
    stop = Stop()
    await drive(FakeTarget(fail), Limits(stop_on_errors=1.0, requests=200), Gamma(2000.0), stop)
    assert stop.reason is None


@pytest.mark.parametrize("concurrency", [None, 4])
async def test_what_runs_when_the_run_is_stopped_is_written_down(concurrency):
    stop = Stop()
    asyncio.get_running_loop().call_later(0.1, stop.set, "by hand")
    target = FakeTarget(lambda _: asyncio.sleep(60))
    records = await drive(target, Limits(concurrency=concurrency), None if concurrency else Gamma(100.0), stop)
    assert len(records) == len(target.asked) > 0
    assert {(record.error, record.message) for record in records} == {("interrupted", "by hand")}


class Flood:
    """All is due at once, without end."""

    def due(self, draw):
        return itertools.repeat(Due(0.0))


async def test_a_request_that_is_stopped_before_it_is_sent_has_a_record_too():
    """In a flood there is always one whose task has not begun when the run is stopped."""
    stop = Stop()

    async def stop_all(request):
        if request.number == 20:
            stop.set("enough")

    target = FakeTarget(stop_all)
    driver = Driver(target, plan(Flood()), Limits(), stop, tally := Tally())
    await driver.run()
    assert len(driver.records) == tally.sent == tally.ended > len(target.asked)
    assert all(record.error == "interrupted" for record in driver.records[len(target.asked) :])


async def test_a_closed_loop_does_not_storm_a_server_that_refuses():
    async def fail(request):
        raise Failed("503", retry_after_s=60.0)

    target = FakeTarget(fail)
    await drive(target, Limits(concurrency=2, duration_s=0.3, stop_on_errors=1.0))
    assert len(target.asked) == 2


async def test_a_session_tells_how_long_it_measured():
    target = FakeTarget(lambda _: asyncio.sleep(0.1))
    run = await Session(target, options={"rate": 1}).run(plan(EVERY), Limits(warm_up_s=0.2), Stop())
    assert run.seconds == pytest.approx(max(record.ended for record in run.records) - 0.2)
    assert (run.options, run.target, run.stopped_early) == ({"rate": 1, "seed": 1}, "fake", None)
    assert 0.0 < run.client_busy < 1.0


async def measured(limits: Limits, arrivals=EVERY, stop: Stop | None = None, answer_s: float = 0.0):
    target = FakeTarget(lambda _: asyncio.sleep(answer_s))
    return await Session(target).run(plan(arrivals), limits, stop or Stop())


async def test_the_time_of_sending_is_not_the_time_until_the_last_answer():
    """An overloaded server answers long after the last request was due."""
    run = await measured(Limits(warm_up_s=0.05, duration_s=0.1), answer_s=0.3)
    assert run.window_s == 0.1
    assert run.seconds > 0.25
    assert (await measured(Limits(duration_s=5.0))).window_s == 0.39  # the trace ends before
    assert (await measured(Limits(warm_up_s=0.055))).window_s == pytest.approx(0.335)  # all of a trace
    assert (await measured(Limits(requests=21))).window_s == 0.2
    assert (await measured(Limits(requests=4, concurrency=2))).window_s == 0.0  # nothing is due in a closed loop


async def test_a_run_that_was_stopped_sent_until_then():
    stop = Stop()
    asyncio.get_running_loop().call_later(0.1, stop.set, "by hand")
    run = await measured(Limits(duration_s=60.0), Gamma(200.0), stop)
    assert run.window_s == max(record.planned for record in run.records) < 60.0


@pytest.mark.parametrize(
    ("limits", "unsent"),
    [(Limits(duration_s=0.05), r"4\d0,000|5\d0,000"), (Limits(requests=1_000_000), r"9\d0,000|1,000,000")],
)
async def test_a_rate_that_the_generator_cannot_send_ends_the_run(limits, unsent, monkeypatch):
    """Far more is due than it can send: by planned moments alone the run would go on for minutes."""
    monkeypatch.setattr(driving, "MOST_BEHIND_S", 0.02)
    run = await measured(limits, Gamma(1e7))
    about = r"the load generator could not send (\d|1\d),\d00,000 requests a second: [\d,]+ went out in 0\.\d s"
    assert re.fullmatch(f"{about}, and about ({unsent}) more were due", run.stopped_early)
    assert {record.error for record in run.records} == {None}  # what was sent is waited for
    assert len(run.records) / run.window_s == pytest.approx(1e7, rel=0.3)


async def test_a_trace_is_sent_to_its_end_however_late(monkeypatch):
    monkeypatch.setattr(driving, "MOST_BEHIND_S", 0.0)
    run = await measured(Limits(), Trace((Due(0.0),) * 500))
    assert (len(run.records), run.stopped_early) == (500, None)


class Breaks:
    """Lengths that end with a fault."""

    def __init__(self, good: int) -> None:
        self._good = good

    def pick(self, number, draw):
        if number >= self._good:
            raise ZeroDivisionError("oh")
        return 2


@pytest.mark.parametrize("concurrency", [None, 2])
async def test_a_fault_while_making_a_request_ends_the_run_and_keeps_its_records(concurrency):
    broken = replace(plan(None if concurrency else EVERY), output=Breaks(6))
    run = await Session(FakeTarget()).run(broken, Limits(concurrency=concurrency, requests=40), Stop())
    assert run.stopped_early == "the load generator failed: ZeroDivisionError: oh"
    assert [record.number for record in run.records] == list(range(6))
    assert {(record.error, record.message) for record in run.records} <= {
        (None, ""),
        ("interrupted", run.stopped_early),
    }
    assert run.records[0].error is None


async def test_a_fault_in_arrivals_ends_the_run_and_keeps_its_records():
    class Broken:
        def due(self, draw):
            yield from EVERY.moments[:3]
            raise InvalidRequest("line 4: not a number")

    run = await measured(Limits(requests=40), Broken())
    assert (run.stopped_early, len(run.records)) == ("the load generator failed: line 4: not a number", 3)


async def test_sending_is_done_only_when_nothing_more_is_due():
    tally, seen = Tally(), []

    async def look(request):
        seen.append(tally.done_sending)
        await asyncio.sleep(0.02)
        seen.append(tally.done_sending)

    driver = Driver(FakeTarget(look), plan(Trace((Due(0.0),) * 3)), Limits(), Stop(), tally)
    await driver.run()
    assert (seen[0], seen[-1]) == (False, True)

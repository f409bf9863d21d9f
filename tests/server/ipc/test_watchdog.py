"""The judgement alone: no process, no waiting."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from perseid_server.ipc.pulse import Beat, Compiling, Phase, Pulse, Running, Vitals
from perseid_server.ipc.watchdog import PATIENCE, Limits, Verdict, Watchdog

LIMITS = Limits(10.0)


def looks(watchdog: Watchdog, beats: list[Beat], start: float = 0.0, every: float = 1.0) -> list[Verdict]:
    """What each look says; the first is at `start` + `every`."""
    return [watchdog.look(beat, start + every * (turn + 1)) for turn, beat in enumerate(beats)]


def test_a_pulse_that_stands_still_in_a_step_is_stuck_after_the_limit() -> None:
    still = [Beat(5, Phase.STEPPING, 0.0)] * 12
    assert looks(Watchdog(LIMITS, 0.0), still) == ["fine"] * 10 + ["stuck"] * 2


def test_a_pulse_that_goes_on_is_fine_for_ever() -> None:
    assert set(looks(Watchdog(LIMITS, 0.0), [Beat(n, Phase.STEPPING, 0.0) for n in range(1000)])) == {"fine"}


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.COMPILING])
def test_starting_and_compiling_may_take_longer(phase: Phase) -> None:
    verdicts = looks(Watchdog(LIMITS, 0.0), [Beat(1, phase, 0.0)] * (10 * PATIENCE + 1))
    assert verdicts == ["fine"] * (10 * PATIENCE) + ["stuck"]


def test_an_engine_that_waits_is_asked_and_one_that_does_not_answer_is_stuck() -> None:
    verdicts = looks(Watchdog(LIMITS, 0.0), [Beat(1, Phase.WAITING, 0.0)] * 15)
    assert verdicts == ["fine"] * 3 + ["ping"] + ["fine"] * 9 + ["stuck"] * 2
    answered = [Beat(1, Phase.WAITING, 0.0)] * 5 + [Beat(3, Phase.WAITING, 0.0)] * 5
    assert looks(Watchdog(LIMITS, 0.0), answered).count("ping") == 2


def test_time_that_the_watcher_itself_was_away_counts_for_little() -> None:
    watchdog = Watchdog(LIMITS, 0.0)
    beat = Beat(1, Phase.STEPPING, 0.0)
    assert looks(watchdog, [beat, beat]) == ["fine", "fine"]
    assert watchdog.look(beat, 3600.0) == "fine", "the whole machine slept"
    assert "stuck" in looks(watchdog, [beat] * 10, start=3600.0)


def test_no_limit_is_for_ever() -> None:
    assert set(looks(Watchdog(Limits(None), 0.0), [Beat(1, Phase.STEPPING, 0.0)] * 10_000)) == {"fine"}


def test_what_the_engine_writes_its_supervisor_reads() -> None:
    vitals = Vitals()
    engine = Pulse(vitals.pulse_descriptor)
    assert vitals.pulse.read().phase is Phase.STARTING
    before = vitals.pulse.read().count
    engine.beat(Phase.STEPPING)
    assert (vitals.pulse.read().count, vitals.pulse.read().phase) == (before + 1, Phase.STEPPING)
    engine.runs(7, ["a#1", "é#2"])
    assert vitals.pulse.running_now() == Running(7, ("a#1", "é#2"), is_whole=True)
    engine.runs(0, [])
    assert vitals.pulse.running() == Running(0)
    engine.beat(Phase.WAITING)
    assert vitals.pulse.running_now() == Running()
    os.write(vitals.stacks_descriptor, b"File x\n")
    assert vitals.stacks() == "File x"
    engine.close()
    vitals.close()


def test_more_requests_than_the_page_has_room_for_may_all_be_running() -> None:
    vitals = Vitals()
    vitals.pulse.runs(1000, ["x" * 200 + str(number) for number in range(1000)])
    running = vitals.pulse.running()
    assert 300 < len(running.request_ids) < 1000
    assert running.num_rows == 1000
    assert running.may_be_one_of("another")
    vitals.close()


def test_compiling_is_marked_on_the_loops_thread_only_and_the_phase_before_comes_back() -> None:
    vitals = Vitals()
    pulse, compiling = vitals.pulse, Compiling(vitals.pulse)

    def phases() -> list[Phase]:
        seen = []
        for moment in (compiling.began, compiling.began, compiling.ended):  # the first of two failed
            moment()
            seen.append(pulse.read().phase)
        return seen

    for phase in (Phase.STARTING, Phase.STEPPING):
        pulse.beat(phase)
        assert phases() == [Phase.COMPILING, Phase.COMPILING, phase]
    count = pulse.read().count
    with ThreadPoolExecutor(1) as loader:
        assert loader.submit(phases).result() == [Phase.STEPPING] * 3
    assert pulse.read().count == count
    vitals.close()

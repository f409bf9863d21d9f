"""The adapters that capacity is measured with, and what is said of what was found."""

from pathlib import Path

import pytest
from rich.console import Console

from perseid_loadtest.analysis.slo import Slo
from perseid_loadtest.capacity import Capacity, _capacity, adapters_for, table
from perseid_loadtest.drive import Arrival
from perseid_loadtest.offline import example_adapters
from perseid_loadtest.traffic.record import RequestRecord, Run
from perseid_loadtest.traffic.sweep import Sweep, Trial
from perseid_server.adapters.store import version_of

SLO = Slo.parse("ttft=1s")


@pytest.mark.parametrize("count", [0, 3, 8, 20])
def test_as_many_adapters_as_asked_for_and_no_two_alike(count):
    with adapters_for(count) as adapters:
        names, folders = zip(*(one.split("=") for one in adapters), strict=True) if adapters else ((), ())
        assert len(set(names)) == len({version_of(Path(folder)) for folder in folders}) == count
        copied = [folder for folder in folders if folder not in {one.partition("=")[2] for one in example_adapters()}]
        assert len(copied) == max(count - 8, 0)
    assert not any(Path(folder).exists() for folder in copied)


def run(*ttft: float) -> Run:
    records = tuple(
        RequestRecord(number, "", 0.0, 0.0, 3.0, arrivals=[Arrival(time, 1), Arrival(3.0, 3)], output_tokens=3)
        for number, time in enumerate(ttft)
    )
    return Run("", {}, 0.0, 4.0, records)


def test_the_best_trial_is_told_and_none_as_none():
    trials = (Trial(4.0, 1.0, True, run(0.5)), Trial(8.0, 0.5, False, run(0.5, 2.0)))
    found = _capacity(8, Sweep(trials), SLO)
    assert (found.adapters, found.trials, found.rate, found.good_share) == (8, 2, 4.0, 1.0)
    assert found.summary.answered == 1
    assert _capacity(0, Sweep(trials[1:]), SLO) == Capacity(0, 1)
    console = Console(width=120, record=True)
    console.print(table([found, Capacity(0, 1)], SLO, 0.99))
    text = console.export_text()
    assert "99% of the requests meet TTFT ≤ 1.00 s" in text
    lines = [line.split("│")[1:-1] for line in text.splitlines() if "%" in line and "│" in line]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["8", "4", "100.0%", "1", "500 ms", "500 ms", "1.25 s"],
        ["0", "0", "0.0%", "–", "–", "–", "–"],
    ]

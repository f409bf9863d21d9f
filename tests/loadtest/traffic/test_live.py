"""What the terminal shows while a run lasts."""

import pytest
from rich.console import Console

from perseid_loadtest.drive import Arrival
from perseid_loadtest.traffic.driver import Limits
from perseid_loadtest.traffic.live import progress
from perseid_loadtest.traffic.record import RequestRecord
from perseid_loadtest.traffic.tally import Tally


def shown(limits: Limits, seconds: float) -> str:
    tally = Tally(sent=5)
    tally.add(RequestRecord(0, "", 1.0, 1.0, 2.0, (Arrival(1.25, 7),), output_tokens=7))
    tally.add(RequestRecord(1, "", 1.0, 1.0, 2.0, error="429"))
    console = Console(width=120, record=True, quiet=True)
    with console.capture() as captured:
        console.quiet = False
        console.print(progress(tally, limits, "http://h", seconds, 2.0, 70.0))
    return captured.get()


@pytest.mark.parametrize(
    ("limits", "seconds", "phase"),
    [
        (Limits(warm_up_s=5.0, duration_s=10.0), 2.0, "warming up, 3 s more"),
        (Limits(warm_up_s=5.0, duration_s=10.0), 9.0, "4 of 10 s"),
        (Limits(duration_s=10.0), 12.0, "all sent, waiting for 3"),
        (Limits(requests=50), 4.0, "4 s, 2 of 50 requests"),
    ],
)
def test_where_the_run_stands(limits: Limits, seconds: float, phase: str):
    text = shown(limits, seconds)
    assert phase in text
    for part in ("3 running, 2 ended, 2.0 a second", "7 in ended answers, 70 a second", "250 ms", "1 × 429"):
        assert part in text

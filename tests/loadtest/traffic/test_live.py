"""What the terminal shows while a run lasts."""

import pytest
from rich.console import Console

from perseid_loadtest.drive import Arrival
from perseid_loadtest.traffic.driver import Limits
from perseid_loadtest.traffic.live import progress
from perseid_loadtest.traffic.record import RequestRecord
from perseid_loadtest.traffic.tally import Tally


def shown(limits: Limits, seconds: float, done_sending: bool = False) -> str:
    tally = Tally(sent=5, done_sending=done_sending)
    tally.add(RequestRecord(0, "", 1.0, 1.0, 2.0, (Arrival(1.25, 7),), output_tokens=7))
    tally.add(RequestRecord(1, "", 1.0, 1.0, 2.0, error="429"))
    console = Console(width=120, record=True, quiet=True)
    with console.capture() as captured:
        console.quiet = False
        console.print(progress(tally, limits, "http://h", seconds, 2.0, 70.0))
    return captured.get()


@pytest.mark.parametrize(
    ("limits", "seconds", "done_sending", "phase"),
    [
        (Limits(warm_up_s=5.0, duration_s=10.0), 2.0, False, "warming up, 3 s more"),
        (Limits(warm_up_s=5.0, duration_s=10.0), 9.0, False, "4 of 10 s"),
        (Limits(duration_s=10.0), 12.0, True, "done sending, waiting for 3"),
        (Limits(duration_s=10.0), 12.0, False, "2 s behind, still sending what was due within 10 s"),
        (Limits(duration_s=10.0, concurrency=2), 12.0, False, "done sending, waiting for 3"),
        (Limits(requests=50), 4.0, False, "4 s, 2 of 50 requests"),
        (Limits(requests=50), 4.0, True, "done sending, waiting for 3"),
        (Limits(), 4.0, True, "done sending, waiting for 3"),
    ],
)
def test_where_the_run_stands(limits: Limits, seconds: float, done_sending: bool, phase: str):
    text = shown(limits, seconds, done_sending)
    assert phase in text
    for part in ("3 running, 2 ended, 2.0 a second", "7 in ended answers, 70 a second", "250 ms", "1 × 429"):
        assert part in text

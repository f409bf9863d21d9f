"""What a soak run checks, on runs that are known."""

import os

import pytest

from perseid_loadtest.soak import _flat, _of_requests, _plan
from perseid_loadtest.traffic.memory import Watched, resident_mib
from perseid_loadtest.traffic.record import ChurnRecord, RequestRecord, Run

PLAN = _plan(("a",))


def record(number: int, error: str | None = None, missing: int = 0) -> RequestRecord:
    tokens = PLAN.request(number).output_tokens - missing
    return RequestRecord(number, "a", 0.0, 0.0, 1.0, output_tokens=tokens, error=error)


def held(*records: RequestRecord, churn: tuple[ChurnRecord, ...] = ()) -> list[bool]:
    return [check.held for check in _of_requests(Run("", {}, 0.0, 1.0, records, churn), PLAN)]


def test_what_is_checked_of_requests():
    assert held(record(0), record(1)) == [True, True]
    assert held(record(0), record(1, "503")) == [False, True]
    assert held(record(0), record(1), churn=(ChurnRecord("load", "a", 0.0, 1.0, "409: no"),)) == [False, True]
    assert held(record(0), record(0)) == [True, False]
    assert held(record(0), record(2)) == [True, False]
    assert held(record(0, missing=1)) == [True, False]


@pytest.mark.parametrize(
    ("mib", "flat"),
    [([100, 104, 100, 97, 100, 103], True), ([100, 100, 104, 108, 110, 112], False), ([100, 90, 80], False)],
)
def test_memory_is_flat_within_five_percent(mib, flat):
    assert _flat(Watched("engine", 1, mib)).held is flat


def test_memory_of_this_process_and_of_none():
    assert 5 < resident_mib(os.getpid()) < 100_000
    with pytest.raises(ProcessLookupError):
        resident_mib(2**22 + 1)

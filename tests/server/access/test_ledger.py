"""What keys have used is neither lost nor made up, whatever the disk does."""

import errno
import json
import os
import stat
import threading
from pathlib import Path

import pytest

from perseid_server.access import ledger as module
from perseid_server.access.ledger import DAY_S, Ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "usage.json"


def test_what_was_used_survives_a_restart_for_the_owner_alone(path: Path) -> None:
    ledger = Ledger(path)
    ledger.add("a", 7)
    ledger.save()
    assert Ledger(path).used("a").total == Ledger(path).used("a").today == 7
    assert [one.name for one in path.parent.iterdir()] == ["usage.json"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


DAMAGED = ("{", "", "[]", "{}x", '{"a": 1}', '{"a": {}}', "[" * 100_000, '{"a": {"total": 1e9, "day": 0, "today": 0}}')
NO_COUNTS = (-1, 1 << 62, 10**400, True, None, "1", 0.5)


@pytest.mark.parametrize(
    "text", [*DAMAGED, *(json.dumps({"a": {"total": 0, "day": n, "today": 0}}) for n in NO_COUNTS)]
)
def test_a_damaged_file_counts_from_zero_and_is_kept(text: str, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.write_text(text)
    ledger = Ledger(path)
    assert ledger.used("a").total == 0
    assert "counts from zero" in caplog.text
    ledger.add("a", 3)
    ledger.save()
    assert Ledger(path).used("a").total == 3
    assert path.with_name("usage.json.damaged").read_text() == text


def test_the_first_damaged_file_is_the_one_that_is_kept(path: Path) -> None:
    for text in ("first", "second"):
        path.write_text(text)
        Ledger(path)
    assert path.with_name("usage.json.damaged").read_text() == "first"


def test_a_file_that_is_no_file_is_told(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.mkdir()
    ledger = Ledger(path)
    assert "Is a directory" in caplog.text
    ledger.add("a", 1)
    ledger.save()
    assert Ledger(path).used("a").total == 1


@pytest.mark.parametrize("call", ["open", "fsync"])
def test_a_full_disk_is_told_once_and_tried_again(
    call: str, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger(path)
    ledger.add("a", 1)
    ledger.save()
    ledger.add("a", 2)
    with monkeypatch.context() as full:

        def no_space(*_: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        full.setattr(module.os, call, no_space)
        for _ in range(3):
            ledger.save()
    assert [record.getMessage() for record in caplog.records] == [
        "what API keys have used cannot be written: No space left on device"
    ]
    assert Ledger(path).used("a").total == 1
    assert [one.name for one in path.parent.iterdir()] == ["usage.json"]
    ledger.save()
    assert Ledger(path).used("a").total == 3
    with monkeypatch.context() as full:  # a second time is told as the first was
        full.setattr(module.os, call, no_space)
        ledger.add("a", 1)
        ledger.save()
    assert len(caplog.records) == 2


def test_a_link_in_the_place_of_the_new_file_is_not_written_through(path: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / ".usage.json.new").symlink_to(tmp_path / "theirs")
    ledger = Ledger(path)
    ledger.add("a", 1)
    ledger.save()
    assert (tmp_path / "theirs").read_text() == "theirs"
    ledger.save()
    assert Ledger(path).used("a").total == 1


def test_nothing_is_written_where_nothing_was_used(path: Path) -> None:
    ledger = Ledger(path)
    ledger.used("a")
    ledger.save()
    assert not path.exists()
    Ledger().save()


def test_keys_may_come_while_it_is_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dictionary that grows while it is gone through is an error, which once ended the thread that writes."""
    ledger, writing, may_go_on = Ledger(path), threading.Event(), threading.Event()
    ledger.add("a", 1)

    def slow(used: object, original=module.asdict) -> dict:
        writing.set()
        may_go_on.wait(0.2)  # the other thread waits for this one; without that it would be through by now
        return original(used)

    monkeypatch.setattr(module, "asdict", slow)
    other = threading.Thread(target=lambda: (writing.wait(20), ledger.used("b"), may_go_on.set()))
    other.start()
    ledger.save()
    other.join(20)
    assert json.loads(path.read_text()).keys() == {"a"}
    assert ledger.used("b").total == 0


def test_the_thread_writes_and_the_end_writes_the_rest(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_INTERVAL_S", 0.001)
    ledger = Ledger(path)
    ledger.add("a", 1)
    ledger.start()
    while not path.exists():  # the suite's timeout ends it
        os.sched_yield()
    ledger.add("a", 1)
    ledger.stop()
    assert Ledger(path).used("a").total == 2
    assert not [thread for thread in threading.enumerate() if "API keys have used" in thread.name]


def test_what_is_written_already_is_not_written_again(path: Path) -> None:
    ledger = Ledger(path)
    ledger.add("a", 1)
    ledger.save()
    before = path.stat().st_ino
    ledger.save()
    assert path.stat().st_ino == before


def test_days_are_those_of_utc() -> None:
    now = [10 * DAY_S - 1.0]
    ledger = Ledger(wall=lambda: now[0])
    ledger.add("a", 5)
    assert (ledger.used("a").today, ledger.until_tomorrow_s("a")) == (5, 1.0)
    now[0] += 1
    assert (ledger.used("a").today, ledger.used("a").total, ledger.until_tomorrow_s("a")) == (0, 5, DAY_S)
    ledger.add("a", 2)
    now[0] -= DAY_S / 2  # a clock that is set back does not bring yesterday's count, nor forget today's
    assert ledger.used("a").today == 2
    assert ledger.until_tomorrow_s("a") == 0.5 * DAY_S
    now[0] = 100 * DAY_S - 0.0001
    assert ledger.until_tomorrow_s("a") == 0.001


def test_what_is_given_back_is_no_more_than_was_taken() -> None:
    ledger = Ledger(wall=lambda: 0.0)
    day = ledger.add("a", 5)
    ledger.give_back("a", 7, day)
    assert (ledger.used("a").total, ledger.used("a").today) == (0, 0)


def test_what_is_given_back_is_written(path: Path) -> None:
    ledger = Ledger(path)
    day = ledger.add("a", 5)
    ledger.save()
    ledger.give_back("a", 2, day)
    ledger.save()
    assert Ledger(path).used("a").total == 3


def test_the_next_day_gets_nothing_back_of_what_the_day_before_took() -> None:
    now = [10 * DAY_S - 1.0]
    ledger = Ledger(wall=lambda: now[0])
    yesterday = ledger.add("a", 5)
    now[0] += 1
    today = ledger.add("a", 7)
    ledger.give_back("a", 5, yesterday)
    assert (ledger.used("a").total, ledger.used("a").today) == (7, 7)
    ledger.give_back("a", 7, today)
    assert (ledger.used("a").total, ledger.used("a").today) == (0, 0)


def test_what_a_later_day_took_is_given_back_though_the_clock_is_set_back() -> None:
    now = [10 * DAY_S]
    ledger = Ledger(wall=lambda: now[0])
    day = ledger.add("a", 5)
    now[0] -= DAY_S  # what was taken counts for this day now
    ledger.give_back("a", 5, day)
    assert (ledger.used("a").total, ledger.used("a").today) == (0, 0)

"""Work is done again and again, whatever becomes of it, and not after the end."""

import threading

import pytest

from perseid_server.access.periodically import Periodically


def test_it_is_done_again_and_again_though_it_fails(caplog: pytest.LogCaptureFixture) -> None:
    done = threading.Semaphore(0)

    def work() -> None:
        done.release()
        raise ValueError("nonsense")

    periodically = Periodically("counting sheep", 0.001, work)
    periodically.start()
    for _ in range(3):
        assert done.acquire(timeout=20)
    periodically.stop()
    assert "counting sheep failed" in caplog.text
    assert not [thread for thread in threading.enumerate() if thread.name == "counting sheep"]


def test_the_end_waits_for_what_is_being_done() -> None:
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert may_end.wait(20)
        ended.set()

    periodically = Periodically("x", 0.001, work)
    periodically.start()
    assert begun.wait(20)
    stopper = threading.Thread(target=periodically.stop)
    stopper.start()
    may_end.set()
    stopper.join(20)
    assert ended.is_set()


def test_what_was_never_begun_ends_at_once() -> None:
    Periodically("x", 3600, lambda: None).stop()


def test_nothing_is_done_before_an_interval_is_over() -> None:
    done = threading.Event()
    periodically = Periodically("x", 3600, done.set)
    periodically.start()
    periodically.stop()
    assert not done.is_set()

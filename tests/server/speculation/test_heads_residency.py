"""Heads on their way to the device, there, gone, broken."""

import threading
import time
from pathlib import Path

import pytest

from perseid_server.adapters.backoff import FIRST_RETRY_S
from perseid_server.errors import AdapterRejected, Unavailable
from perseid_server.speculation.heads_residency import HeadsResidency


def loaded(residency: HeadsResidency[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """All events until nothing is on its way."""
    moved: list[str] = []
    failed: dict[str, str] = {}
    while residency.is_loading:
        events = residency.poll()
        moved += events.moved
        failed |= events.failed
        time.sleep(0.001)
    return tuple(moved), failed


def test_they_come_once() -> None:
    calls: list[Path] = []
    residency: HeadsResidency[str] = HeadsResidency(lambda folder: calls.append(folder) or folder.name)
    residency.register("v", "/store/v")
    residency.register("v", "/store/v")
    assert residency.get("v") is None
    assert loaded(residency) == (("v",), {})
    residency.register("v", "/store/v")
    assert (residency.get("v"), residency.location("v"), calls) == ("v", "device", [Path("/store/v")])
    residency.forget("v")
    residency.forget("v")
    assert residency.get("v") is None
    assert not residency.knows("v")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (AdapterRejected("no"), "no"),
        (FileNotFoundError(2, "No such file", "/store/versions/0123"), "No such file"),
        (MemoryError("full"), "an internal error (MemoryError)"),
    ],
)
def test_what_cannot_be_loaded_says_why_and_may_be_tried_again(error: Exception, told: str) -> None:
    outcomes: list[Exception | None] = [error, None]

    def load(folder: Path) -> str:
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome
        return folder.name

    residency: HeadsResidency[str] = HeadsResidency(load)
    residency.register("v", "/store/v")
    _, failed = loaded(residency)
    assert failed["v"] == residency.error("v") == told
    assert (residency.get("v"), residency.location("v")) == (None, "disk")
    residency.register("v", "/store/v")
    assert loaded(residency) == (("v",), {})
    assert residency.error("v") is None


@pytest.mark.parametrize(
    ("error", "comes"),
    [
        (FileNotFoundError(2, "No such file"), True),
        (MemoryError(), True),
        (Unavailable("later"), True),
        (AdapterRejected("no"), False),
    ],
    ids=["file", "memory", "unavailable", "wrong"],
)
def test_what_may_pass_is_tried_again_after_a_while(error: Exception, comes: bool) -> None:
    now, outcomes = [100.0], [error, error]

    def load(folder: Path) -> str:
        if outcomes:
            raise outcomes.pop()
        return folder.name

    residency: HeadsResidency[str] = HeadsResidency(load, clock=lambda: now[0])
    residency.register("v", "/store/v")
    loaded(residency)
    for wait_s in (FIRST_RETRY_S, 2 * FIRST_RETRY_S):
        now[0] += wait_s - 0.01
        residency.poll()
        assert not residency.is_loading
        assert residency.error("v") is not None
        now[0] += 0.01
        residency.poll()
        assert residency.is_loading == comes
        moved, _ = loaded(residency)
    assert (moved == ("v",), residency.get("v") == "v", residency.error("v") is None) == (comes,) * 3


def test_heads_that_fail_at_work_are_not_tried_again() -> None:
    now = [0.0]
    residency: HeadsResidency[str] = HeadsResidency(lambda folder: folder.name, clock=lambda: now[0])
    residency.register("v", "/store/v")
    loaded(residency)
    residency.fail("v", "they failed")
    now[0] = 1000.0
    residency.poll()
    assert not residency.is_loading


def test_forgotten_while_they_load() -> None:
    go = threading.Event()
    residency: HeadsResidency[str] = HeadsResidency(lambda folder: str(go.wait(5)))
    residency.register("v", "/store/v")
    residency.forget("v")
    go.set()
    assert not residency.is_loading
    assert residency.poll().moved == ()


def test_heads_that_fail_at_work_are_let_go_and_told() -> None:
    residency: HeadsResidency[str] = HeadsResidency(lambda folder: folder.name)
    residency.register("v", "/store/v")
    loaded(residency)
    residency.fail("v", "they failed")
    assert (residency.get("v"), residency.error("v")) == (None, "they failed")
    assert residency.poll().failed == {"v": "they failed"}
    assert residency.poll().failed == {}

"""Gate sets come to the device when they are needed and leave when nobody needs them."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from perseid_kernels.routing import GateTable
from perseid_server.adapters.backoff import FIRST_RETRY_S
from perseid_server.adapters.gate_residency import MAX_IDLE, GateResidency, GateSource
from perseid_server.errors import AdapterRejected, Unavailable

SOURCE = GateSource(None, ("a",), (None,), null=True)


def table_of(source: GateSource) -> GateTable:
    return GateTable((), torch.zeros(2, dtype=torch.int32), len(source.adapters) + source.null)


@pytest.fixture
def gates() -> Iterator[GateResidency]:
    residency = GateResidency(table_of)
    yield residency
    residency.close()


def settle(gates: GateResidency):
    """Poll until nothing is loading; all that happened."""
    moved, failed = set(), {}
    while True:
        events = gates.poll()
        moved |= set(events.moved)
        failed |= events.failed
        if not gates.is_loading:
            return moved, failed
        time.sleep(0)


def test_a_set_is_loaded_when_it_is_first_asked_for(gates: GateResidency):
    gates.register("g", SOURCE, pinned=False)
    assert gates.location("g") == "disk"
    assert gates.acquire("g") == "loading"
    assert settle(gates) == ({"g"}, {})
    assert gates.acquire("g") == "ready"
    assert gates.table("g").num_columns == 2
    assert gates.location("g") == "device"


def test_a_pinned_set_is_loaded_at_once(gates: GateResidency):
    gates.register("g", SOURCE, pinned=True)
    settle(gates)
    assert gates.acquire("g") == "ready"


def test_idle_sets_leave_least_recently_used_first(gates: GateResidency):
    names = [f"g{i}" for i in range(MAX_IDLE + 2)]
    for name in ("used", "pinned", *names):
        gates.register(name, SOURCE, pinned=name == "pinned")
        gates.prefetch(name)
        settle(gates)
        if name == "used":
            assert gates.acquire(name) == "ready"
    assert [gates.location(name) for name in names] == ["disk", "disk", *["device"] * MAX_IDLE]
    assert gates.location("used") == gates.location("pinned") == "device"


def test_a_forgotten_set_stays_for_its_users(gates: GateResidency):
    gates.register("g", SOURCE, pinned=True)
    settle(gates)
    gates.acquire("g")
    gates.forget("g")
    assert gates.knows("g")
    assert gates.table("g").num_columns == 2
    gates.release("g")
    assert not gates.knows("g")


def test_a_set_that_is_forgotten_while_it_loads_is_no_failure():
    may_end = threading.Event()

    def build(source: GateSource) -> GateTable:
        may_end.wait()
        raise AdapterRejected("its files are gone")

    gates = GateResidency(build)
    gates.register("g", SOURCE, pinned=True)
    gates.forget("g")
    may_end.set()
    assert settle(gates) == (set(), {})
    assert not gates.knows("g")
    gates.close()


def test_a_set_that_cannot_be_loaded_says_why():
    def build(source: GateSource) -> GateTable:
        raise AdapterRejected("tensor x holds NaN")

    gates = GateResidency(build)
    gates.register("g", SOURCE, pinned=False)
    assert gates.acquire("g") == "loading"
    assert settle(gates) == (set(), {"g": "tensor x holds NaN"})
    assert gates.acquire("g") == "failed"
    assert gates.error("g") == "tensor x holds NaN"
    gates.register("g", SOURCE, pinned=False)  # loaded again
    assert gates.error("g") is None
    gates.close()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError("m"), "an internal error (MemoryError)"),
        (Unavailable("its files cannot be read now"), "its files cannot be read now"),
    ],
    ids=["memory", "files"],
)
def test_what_passes_costs_those_who_wait_and_nobody_else(error: Exception, told: str):
    errors = [error]

    def build(source: GateSource) -> GateTable:
        if errors:
            raise errors.pop()
        return table_of(source)

    gates = GateResidency(build)
    gates.register("g", SOURCE, pinned=False)
    assert gates.acquire("g") == "loading"
    while gates.is_loading:
        events = gates.poll()
    assert (events.failed, events.passing) == ({"g": told}, {"g"})
    assert gates.acquire("g") == "loading", "the next request tries again"
    settle(gates)
    assert gates.acquire("g") == "ready"
    gates.close()


def test_a_pin_whose_load_failed_for_a_moment_is_tried_again_after_a_while():
    now, tries, is_broken = [100.0], [], [True]

    def build(source: GateSource) -> GateTable:
        tries.append(now[0])
        if is_broken:
            raise Unavailable("its files cannot be read now")
        return table_of(source)

    gates = GateResidency(build, clock=lambda: now[0])
    gates.register("pinned", SOURCE, pinned=True)
    gates.register("other", SOURCE, pinned=False)
    for _ in range(5):
        settle(gates)
        settle(gates)
        now[0] += FIRST_RETRY_S
    assert tries == [100.0, 100 + FIRST_RETRY_S, 100 + 3 * FIRST_RETRY_S]
    [told, _] = gates.residents()
    assert told.error == gates.error("pinned") == "its files cannot be read now"
    assert gates.problem("pinned") is None
    is_broken.clear()
    now[0] += 10 * FIRST_RETRY_S
    settle(gates)
    assert settle(gates)[1] == {}
    assert (gates.location("pinned"), gates.location("other")) == ("device", "disk")
    assert gates.error("pinned") is None
    gates.close()


def test_a_pin_whose_files_are_wrong_is_not_tried_again():
    tries = []

    def build(source: GateSource) -> GateTable:
        tries.append(source)
        raise AdapterRejected("tensor x holds NaN")

    now = [0.0]
    gates = GateResidency(build, clock=lambda: now[0])
    gates.register("g", SOURCE, pinned=True)
    settle(gates)
    now[0] = 1000.0
    settle(gates)
    assert len(tries) == 1
    gates.close()


def test_a_set_that_comes_back_while_its_files_go_is_loaded_again():
    """Forgotten, deleted and registered anew while the loader reads what was deleted."""
    may_end, gone = threading.Event(), [AdapterRejected("its files cannot be read")]

    def build(source: GateSource) -> GateTable:
        may_end.wait()
        if gone:
            raise gone.pop()
        return table_of(source)

    gates = GateResidency(build)
    gates.register("g", SOURCE, pinned=True)
    gates.forget("g")
    gates.register("g", SOURCE, pinned=False)
    may_end.set()
    assert settle(gates) == ({"g"}, {})
    assert gates.acquire("g") == "ready"
    gates.close()


def test_large_idle_sets_do_not_stay_side_by_side(monkeypatch: pytest.MonkeyPatch, gates: GateResidency):
    monkeypatch.setattr("perseid_server.adapters.gate_residency.MAX_IDLE_BYTES", -1)
    for name in ("a", "b"):
        gates.register(name, SOURCE, pinned=False)
        gates.prefetch(name)
        settle(gates)
    assert [gates.location(name) for name in "ab"] == ["disk", "device"]

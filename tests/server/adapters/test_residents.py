"""A request takes its gate set and its adapters together, or nothing."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from perseid_kernels.routing import GateTable
from perseid_server.adapters import loader
from perseid_server.adapters.gate_residency import GateResidency, GateSource
from perseid_server.adapters.pool import AdapterPool
from perseid_server.adapters.residency import Residency
from perseid_server.adapters.residents import Residents
from perseid_server.adapters.state import Resident
from perseid_server.adapters.store import version_of
from tests.fakes import tiny_spec
from tests.server.adapters.folders import write_adapter

SPEC = tiny_spec()


def build(source: GateSource) -> GateTable:
    return GateTable((), torch.zeros(1, dtype=torch.int32), len(source.adapters) + source.null)


@pytest.fixture
def residents() -> Iterator[Residents]:
    pool = AdapterPool(SPEC, 3, torch.device("cpu"), torch.float32)
    both = Residents(Residency(SPEC, pool, 1 << 30), GateResidency(build))
    yield both
    both.close()


def adapter(residents: Residents, folder: Path, seed: int) -> str:
    made = write_adapter(folder / str(seed), seed=seed, rank=4)
    version = version_of(made)
    residents.register(version, str(made))
    return version


def settle(residents: Residents) -> None:
    while residents.is_loading:
        residents.poll()
        time.sleep(0)
    residents.poll()


def use(residents: Residents, *versions: str) -> None:
    for _ in range(3):
        if residents.acquire(*versions) == "ready":
            return
        settle(residents)
    raise AssertionError("it never came")


def test_both_kinds_are_told(residents: Residents, tmp_path: Path):
    a = adapter(residents, tmp_path, 1)
    residents.register_gate_set("g", None, (a,), null=True, pinned=True)
    assert [one.is_loading for one in residents.residents()] == [False, True]
    settle(residents)
    assert list(residents.residents()) == [
        Resident(a, "adapter", "disk"),
        Resident("g", "gate_set", "device", is_pinned=True),
    ]


def test_what_passes_is_told_of_both_kinds(
    residents: Residents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(loader, "version_of", fail)
    monkeypatch.setattr(residents._gates, "_build", fail)
    a = adapter(residents, tmp_path, 1)
    residents.register_gate_set("g", None, (a,), null=True, pinned=False)
    residents.acquire("g", a)
    passing: set[str] = set()
    while residents.is_loading:
        passing |= residents.poll().passing
        time.sleep(0)
    assert passing == {"g", a}


def test_nothing_is_held_before_all_is_there(residents: Residents, tmp_path: Path):
    a, b = adapter(residents, tmp_path, 1), adapter(residents, tmp_path, 2)
    residents.register_gate_set("g", None, (a, b), null=True, pinned=False)
    for _ in range(2):  # the gates, and the adapters to the host; then the adapters to the device
        assert residents.acquire("g", a, b) == "loading"
        settle(residents)
    assert residents.acquire("g", a, b) == "ready"
    assert residents.gates("g").num_columns == 3
    assert residents.pages(a).pages != residents.pages(b).pages
    for version in ("g", a, b):
        residents.forget(version)
        assert residents.knows(version), "in use"
    residents.release("g", a, b)
    assert not any(residents.knows(version) for version in ("g", a, b))


def test_a_set_that_misses_one_adapter_holds_none(residents: Residents, tmp_path: Path):
    a, b, c, d = (adapter(residents, tmp_path, seed) for seed in range(4))
    use(residents, a, b, c)  # the pool is full and in use
    residents.register_gate_set("g", None, (a, d), null=True, pinned=True)
    assert residents.acquire("g", a, d) == "loading"
    settle(residents)
    assert residents.acquire("g", a, d) == "no_room"
    residents.release(a, b, c)
    residents.forget("g")
    assert not residents.knows("g"), "nobody holds it"


def test_two_requests_that_need_more_than_half_the_room_each_take_turns(residents: Residents, tmp_path: Path):
    """Each evicts what came for the other, if it may: only the oldest may, so it gets all it needs."""
    a, b, c, d = (adapter(residents, tmp_path, seed) for seed in range(4))
    for _ in range(50):
        oldest = residents.acquire(a, b, evict_wanted=True)
        if oldest == "ready":
            break
        residents.acquire(c, d, evict_wanted=False)
        settle(residents)
    assert oldest == "ready"
    assert residents.acquire(c, d, evict_wanted=True) in {"no_room", "loading"}
    residents.release(a, b)
    use(residents, c, d)


def test_the_folders_of_adapters_are_told(residents: Residents, tmp_path: Path):
    told: list[GateSource] = []

    def watch(source: GateSource) -> GateTable:
        told.append(source)
        return build(source)

    residents._gates._build = watch
    a = adapter(residents, tmp_path, 1)
    residents.register_gate_set("g", str(tmp_path), (a, "unknown"), null=False, pinned=True)
    settle(residents)
    assert told == [GateSource(tmp_path, (a, "unknown"), (tmp_path / "1", None), null=False)]


def test_what_pinned_adapters_leave_no_room_for_fails_at_once(residents: Residents, tmp_path: Path):
    """It would wait for ever, and all who need adapters behind it."""
    a, b, c, d = (adapter(residents, tmp_path, seed) for seed in range(4))
    for version in (a, b):
        residents.pin(version, True)
    settle(residents)
    assert residents.acquire(c, d) == "loading", "nothing is known of their size yet"
    settle(residents)
    assert residents.acquire(c, d) == "failed"
    assert "need 2 pages of adapter memory together and there are 3, some of them for pinned" in str(
        residents.problem(c, d)
    )
    use(residents, a, c)
    residents.release(a, c)
    residents.pin(a, False)
    use(residents, c, d)


def test_an_adapter_that_pins_leave_no_room_for_is_not_broken(residents: Residents, tmp_path: Path):
    """Its requests are told so; the list of adapters must not call it broken."""
    a, b, c, d = (adapter(residents, tmp_path, seed) for seed in range(4))
    residents.prefetch(d)
    for version in (a, b, c):
        residents.pin(version, True)
    settle(residents)
    assert residents.acquire(d) == "failed"
    assert "some of them for pinned" in str(residents.problem(d))
    assert residents.error(d) is None
    residents.pin(c, False)
    use(residents, d)

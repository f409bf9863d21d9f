"""What is read to host memory, in which order, and what stays there: counted loads."""

import pytest

from perseid_server.adapters.reading import READ_AHEAD
from perseid_server.adapters.residency import Residency
from tests.server.adapters.slow_loads import COPY_BYTES, SlowLoader, slow_residency

NAMES = ("a", "b", "c", "d", "e")


def made(monkeypatch: pytest.MonkeyPatch, *, device: int, host: float, ticks: int = 1) -> tuple[Residency, SlowLoader]:
    residency, loader = slow_residency(monkeypatch, device=device, host=host, ticks=ticks)
    for name in (*NAMES, "hot"):
        residency.register(name, "")
    return residency, loader


def settle(residency: Residency) -> None:
    residency.poll()
    while residency.is_loading:
        residency.poll()


def use(residency: Residency, *versions: str) -> None:
    while residency.acquire(*versions) != "ready":
        settle(residency)


def places(residency: Residency, *versions: str) -> list[str]:
    return [residency.location(version) for version in versions]


def expect(residency: Residency, *versions: str, claimed: tuple[str, ...] = ()) -> None:
    """Step after step they wait."""
    for _ in range(20):
        residency.prefetch(*versions, claimed=claimed)
        residency.poll()


def test_the_next_are_read_as_far_as_there_is_room_and_none_is_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    residency, loader = made(monkeypatch, device=1, host=3)
    expect(residency, *NAMES)
    assert loader.reads == ["a", "b", "c"]
    expect(residency, *reversed(NAMES))
    assert loader.reads == ["a", "b", "c"], "what is there is not given up for others that wait"
    expect(residency, "d", "e", "a")
    assert loader.reads == ["a", "b", "c", "d", "e"], "nobody waits for b and c any more"


def test_a_claim_takes_the_place_of_what_has_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    residency, loader = made(monkeypatch, device=1, host=2)
    use(residency, "hot")
    expect(residency, "a", "b", "c")
    assert residency.acquire("c") == "loading"
    expect(residency, "a", "b", claimed=("c",))
    assert places(residency, "a", "b", "c") == ["host", "disk", "host"]
    assert loader.reads.count("c") == 1


def test_a_claim_of_several_is_read_one_after_the_other_where_host_memory_holds_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    residency, loader = made(monkeypatch, device=3, host=1)
    while residency.acquire("a", "b", "c") != "ready":
        residency.prefetch("d", claimed=("a", "b", "c"))
        residency.poll()
        assert residency._host.nbytes <= COPY_BYTES
    assert loader.reads == ["a", "b", "c"]


def test_few_reads_stand_before_a_claims_own(monkeypatch: pytest.MonkeyPatch) -> None:
    residency, loader = made(monkeypatch, device=5, host=5)
    use(residency, "hot")
    residency.prefetch(*NAMES)
    assert loader.num_jobs == READ_AHEAD
    assert residency.acquire("e") == "loading"
    assert loader.num_jobs == READ_AHEAD + 1
    expect(residency, *NAMES, claimed=("e",))
    assert loader.reads == ["hot", "a", "b", "e", "c", "d"]


def test_what_has_come_takes_no_room_before_a_claim_that_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    residency, _ = made(monkeypatch, device=1, host=3, ticks=3)
    use(residency, "hot")
    for name, has_claim in (("a", True), ("b", False)):
        residency.acquire(name, evict_wanted=has_claim)
    while residency.location("a") != "host":
        residency.prefetch("a", "b", claimed=("a",))
        residency.poll()
    residency.release("hot")
    while residency.location("b") != "host":
        residency.poll()
    assert places(residency, "hot", "a", "b") == ["device", "host", "host"]
    assert residency.acquire("a") == "loading"


def test_what_came_for_a_request_that_is_gone_keeps_no_room_from_a_pin(monkeypatch: pytest.MonkeyPatch) -> None:
    residency, _ = made(monkeypatch, device=1, host=2)
    assert residency.acquire("a") == "loading"
    residency.prefetch("a", claimed=("a",))
    settle(residency)
    assert residency.location("a") == "device"
    residency.prefetch()  # it was aborted
    residency.pin("b", True)
    settle(residency)
    assert residency.location("b") == "device"


def test_a_pin_without_room_is_not_read_again_before_there_is_some(monkeypatch: pytest.MonkeyPatch) -> None:
    residency, loader = made(monkeypatch, device=2, host=1)
    use(residency, "hot", "a")
    residency.pin("b", True)
    settle(residency)
    assert residency.acquire("c") == "loading"
    expect(residency, claimed=("c",))
    assert places(residency, "b", "c") == ["disk", "host"], "the claim goes first"
    residency.prefetch()
    expect(residency)
    assert loader.reads.count("b") == 1
    residency.release("a")
    settle(residency)
    assert residency.location("b") == "device"


def test_a_read_that_failed_leaves_its_room_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    residency, loader = made(monkeypatch, device=1, host=1)
    loader.failures = 1
    residency.prefetch("a")
    settle(residency)
    assert residency.error("a") == "the disk is gone"
    residency.forget("a")
    expect(residency, "b")
    assert residency.location("b") == "host"

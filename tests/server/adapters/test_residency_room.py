"""How much room there would be, pins that fill the pool, and errors that pass: over the real pool and loader."""

import errno
import itertools
import time

import pytest

from perseid_server.adapters import loader
from perseid_server.adapters.backoff import FIRST_RETRY_S, LAST_RETRY_S
from perseid_server.engine.adapter_room import AdapterRoom
from perseid_server.engine.engine import Engine
from perseid_server.engine.fairness import Shares
from perseid_server.engine.messages import SequenceOutput
from perseid_server.engine.sequence import Sequence
from tests.fakes import fake_engine
from tests.server.adapters.residency_stage import Stage
from tests.server.engine.test_fairness import job

RANKS = (4, 20, 36, 4)  # one page, two, three, one


def run_to_end(engine: Engine) -> dict[str, list[SequenceOutput]]:
    """The loader has a thread of its own: a step that brings nothing leaves it the time it needs. The suite's limit
    ends what has no end."""
    outputs: dict[str, list[SequenceOutput]] = {}
    while engine.has_work:
        told = engine.step().outputs
        for output in told:
            outputs.setdefault(output.request_id, []).append(output)
        if not told:
            time.sleep(0.001)
    return outputs


def would_be_ready(stage: Stage, wanted: str, without: set[str], users: dict[str, int]) -> bool:
    """Really let go of those in `without`, and ask: what `has_room` foretells."""
    for version in without:
        for _ in range(users[version]):
            stage.residency.release(version)
    admission = stage.residency.acquire(wanted)
    stage.settle()
    return admission != "no_room" and stage.residency.acquire(wanted) == "ready"


@pytest.mark.parametrize("in_use", list(itertools.product((0, 2), repeat=3)))
@pytest.mark.parametrize("pinned", [None, 0, 1])
def test_room_is_foretold_as_it_comes_true(stage, in_use: tuple[int, ...], pinned: int | None):
    for index, num_without in enumerate((0, 1, 2, 3)):
        room = stage(num_pages=4)  # full, with one, two and one in use
        versions = [room.adapter(10 * index + seed, rank=rank) for seed, rank in enumerate(RANKS)]
        wide, *others = versions[2], versions[0], versions[1], versions[3]
        for version in others:
            room.touch(version)
        room.residency.prefetch(wide)  # its size is known
        room.settle()
        users = dict(zip(others, in_use, strict=True))
        for version, count in users.items():
            for _ in range(count):
                room.use(version)
        if pinned is not None:
            room.residency.pin(others[pinned], True)
        without = set(others[:num_without])
        foretold = room.residency.has_room(wide, without=tuple(without))
        assert foretold == would_be_ready(room, wide, without, users)


def test_closing_as_few_as_needed_is_decided_by_the_pages_they_hold(stage):
    """The claim of a wide adapter on a pool that narrow ones fill, over the real residency."""
    stage = stage(num_pages=6)
    versions = [stage.adapter(seed, rank=rank) for seed, rank in enumerate((4, 20, 36))]
    wide = stage.adapter(9, rank=20)
    stage.residency.prefetch(wide)
    shares = Shares()
    room, running = AdapterRoom(stage.residency, shares), []
    for arrival, version in enumerate(versions):
        stage.use(version)
        running.append(Sequence(job(f"r{arrival}", adapter=version), arrival))
        shares.enter(running[-1])
        shares.count(running[-1], 0, 8 - arrival)  # the first has been served most
    claimant = Sequence(job("wide", adapter=wide), 10)
    shares.enter(claimant)
    stage.settle()
    assert room.acquire(claimant, running) == "no_room"
    assert room._closed == versions[:2], "one page is not enough, and two more are"
    assert room.claimant is claimant


def test_pins_that_fill_the_pool_leave_each_other_alone_and_others_are_told(stage):
    stage = stage(num_pages=3)
    pinned = [stage.adapter(seed) for seed in range(3)]
    engine = fake_engine(residency=stage.residency)
    for version in pinned:
        engine.register_adapter(version, str(stage.folders[version]), pinned=True)
    stage.settle()
    assert stage.places(*pinned) == ["device"] * 3
    late, other = stage.adapter(7), stage.adapter(8)
    stage.residency.pin(late, True)  # no room: it waits, and takes none from the others
    engine.submit(job("outside", adapter=other, num_tokens=3))
    for number, version in enumerate(pinned):
        engine.submit(job(f"in{number}", adapter=version, num_tokens=3))
    outputs = run_to_end(engine)
    assert [outputs[f"in{number}"][-1].finish_reason for number in range(3)] == ["length"] * 3
    why = "need 1 pages of adapter memory together and there are 3, some of them for pinned adapters"
    assert why in outputs["outside"][-1].error
    assert stage.places(*pinned) == ["device"] * 3
    engine.pin_adapter(pinned[0], pinned=False)
    stage.settle()
    assert stage.places(late) == ["device"], "the pin that waited has the room that was given up"


def test_an_error_that_passes_is_told_to_who_waits_and_the_next_request_tries_again(stage, monkeypatch):
    stage = stage(num_pages=2)
    version = stage.adapter(1)
    engine = fake_engine(residency=stage.residency)
    for number, (error, words) in enumerate(
        [
            (OSError(errno.EMFILE, "Too many open files", "/store/secret"), "cannot be read now: Too many open files"),
            (MemoryError("no memory"), "MemoryError"),
        ]
    ):
        with monkeypatch.context() as patch:

            def fail(_, error=error):
                raise error

            patch.setattr(loader, "version_of", fail)
            engine.submit(job(f"early{number}", adapter=version, num_tokens=3))
            told = run_to_end(engine)[f"early{number}"][-1]
        assert told.finish_reason == "error"
        assert words in told.error
        assert told.error_kind == "unavailable"
        assert "secret" not in told.error
        assert words in stage.residency.error(version)
    engine.submit(job("late", adapter=version, num_tokens=3))
    assert run_to_end(engine)["late"][-1].finish_reason == "length"


def test_a_pin_whose_load_failed_is_tried_again_after_a_while_longer_each_time(stage, monkeypatch):
    stage = stage(num_pages=2)
    version = stage.adapter(1)
    now, tries = [100.0], []
    monkeypatch.setattr(stage.residency, "_clock", lambda: now[0])

    def fail(path):
        tries.append(now[0])
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(loader, "version_of", fail)
        stage.residency.pin(version, True)
        for _ in range(8):
            stage.settle()
            now[0] += FIRST_RETRY_S
        assert tries == [100.0, 100 + FIRST_RETRY_S, 100 + 3 * FIRST_RETRY_S, 100 + 7 * FIRST_RETRY_S]
        [told] = stage.residency.residents()
        assert told.error == stage.residency.error(version) == "its files cannot be read now: Input/output error"
        now[0] += 10 * LAST_RETRY_S
        for _ in range(20):  # in the end as often as this
            stage.settle()
            now[0] += LAST_RETRY_S
    assert tries[-1] - tries[-2] == LAST_RETRY_S
    now[0] += LAST_RETRY_S
    stage.settle()
    assert stage.places(version) == ["device"]
    assert stage.residency.error(version) is None


def test_a_request_for_a_pinned_version_does_not_wait_for_its_next_try(stage, monkeypatch):
    stage = stage(num_pages=2)
    version = stage.adapter(1)

    def fail(path):
        raise MemoryError

    monkeypatch.setattr(stage.residency, "_clock", lambda: 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(loader, "version_of", fail)
        stage.residency.pin(version, True)
        stage.settle()
    stage.use(version)
    assert stage.residency.is_pinned(version)


def test_a_pin_of_a_version_that_was_forgotten_and_is_in_use_is_none(stage):
    stage = stage(num_pages=2)
    version = stage.adapter(1)
    stage.use(version)
    stage.residency.forget(version)
    stage.residency.pin(version, True)
    stage.residency.release(version)
    stage.settle()
    assert not stage.residency.knows(version)
    assert stage.pool.num_free == 2

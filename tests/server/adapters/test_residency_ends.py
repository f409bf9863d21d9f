"""A failure costs one adapter, and what is replaced or forgotten goes with its last user."""

import threading
import time
from pathlib import Path

import pytest

from perseid_server.adapters.lora import WEIGHTS_FILE
from perseid_server.adapters.state import ResidencyEvents
from tests.server.adapters.folders import write_adapter

# --- failures -------------------------------------------------------------------------------------------------------


def test_an_adapter_larger_than_the_pool_fails_and_says_how_to_help(stage):
    stage = stage(num_pages=2)
    wide = stage.adapter(1, rank=40)
    stage.residency.acquire(wide)
    error = stage.settle().failed[wide]
    assert "needs 3 pages" in error
    assert "there are 2" in error
    assert "--adapter-memory" in error
    assert stage.residency.acquire(wide) == "failed"
    assert stage.residency.error(wide) == error
    assert stage.pool.num_free == 2


def change(folder: Path) -> None:
    write_adapter(folder, seed=99)


def remove(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()


@pytest.mark.parametrize(("harm", "words"), [(change, "have changed"), (remove, "cannot be read")])
def test_files_that_are_not_what_was_registered_fail(harm, words, stage):
    stage = stage(num_pages=2)
    bad, good = stage.adapter(1), stage.adapter(2)
    harm(stage.folders[bad])
    stage.residency.acquire(bad)
    assert words in stage.settle().failed[bad]
    assert stage.places(bad) == ["disk"]
    stage.use(good)
    stage.assert_pages_hold(good)


def test_a_load_that_fails_midway_frees_its_pages_and_nothing_else(stage, monkeypatch):
    stage = stage(num_pages=3)
    bad, good = stage.adapter(1, rank=20), stage.adapter(2)
    stage.use(good)
    write = stage.pool.write

    def fail_midway(pages, linears):
        write(pages, linears[:2])
        raise RuntimeError("device lost")

    with monkeypatch.context() as patch:
        patch.setattr(stage.pool, "write", fail_midway)
        stage.residency.acquire(bad)
        assert stage.settle().failed == {bad: "an internal error (RuntimeError)"}
    assert stage.pool.num_free == 2
    assert stage.places(bad, good) == ["host", "device"]
    stage.assert_pages_hold(good)
    stage.residency.register(bad, str(stage.folders[bad]))
    stage.use(bad)
    stage.assert_pages_hold(bad)


# --- replacing and forgetting ---------------------------------------------------------------------------------------


def test_a_replaced_version_keeps_its_pages_until_its_last_user_ends(stage):
    stage = stage(num_pages=2)
    old, new = stage.adapter(1), stage.adapter(2)
    stage.use(old)
    stage.use(old)
    stage.residency.forget(old)
    stage.use(new)
    third = stage.adapter(3)
    stage.residency.prefetch(third)
    stage.settle()
    assert stage.residency.acquire(third) == "no_room"
    stage.assert_pages_hold(old)
    stage.residency.release(old)
    assert stage.residency.knows(old)
    stage.residency.release(old)
    assert not stage.residency.knows(old)
    assert stage.pool.num_free == 1
    assert stage.residency._host.nbytes == stage.host_bytes_of(new) + stage.host_bytes_of(third)


@pytest.mark.parametrize("moment", ["reading", "writing"])
def test_forgetting_while_the_loader_works_lets_go_when_it_is_done(moment, stage, monkeypatch):
    stage = stage(num_pages=2)
    version = stage.adapter(1)
    goes_on = threading.Event()
    where = (stage.residency._loader, "_read") if moment == "reading" else (stage.pool, "write")
    work = getattr(*where)
    monkeypatch.setattr(*where, lambda *job: (goes_on.wait(30), work(*job))[1])
    if moment == "writing":
        stage.residency.prefetch(version)
        stage.settle()
    stage.residency.acquire(version)
    stage.residency.forget(version)
    assert stage.residency.knows(version)
    goes_on.set()
    stage.settle()
    assert not stage.residency.knows(version)
    assert stage.pool.num_free == 2
    assert stage.residency._host.nbytes == 0


def test_registering_again_revives_what_was_to_be_forgotten(stage):
    stage = stage(num_pages=1)
    version = stage.adapter(1)
    stage.use(version)
    stage.residency.forget(version)
    stage.residency.register(version, str(stage.folders[version]))
    stage.residency.release(version)
    assert stage.places(version) == ["device"]


def test_forgetting_a_pinned_version_lets_it_go(stage):
    stage = stage(num_pages=1)
    version = stage.adapter(1)
    stage.residency.pin(version, True)
    stage.settle()
    stage.residency.forget(version)
    assert not stage.residency.knows(version)
    assert stage.pool.num_free == 1
    assert stage.residency.poll() == ResidencyEvents((version,), {})


def test_closing_ends_the_loader(stage):
    stage = stage(num_pages=1)
    stage.residency.close()
    assert not stage.residency._loader._thread.is_alive()
    stage.residency._loader._thread = threading.Thread(target=lambda: None)  # for the fixture to join
    stage.residency._loader._thread.start()


@pytest.mark.parametrize("comes_back", [False, True])
def test_files_deleted_while_a_forgotten_version_is_read_are_no_failure(stage, tmp_path, monkeypatch, comes_back):
    """Unloaded and, in one case, loaded again before the loader has told that the files were gone."""
    stage = stage(num_pages=1)
    version = stage.adapter(1)
    folder, away = stage.folders[version], tmp_path / "away"
    read, begun, may_read = stage.residency._loader._read, threading.Event(), threading.Event()

    def slow(job):
        begun.set()
        assert may_read.wait(10)
        return read(job)

    monkeypatch.setattr(stage.residency._loader, "_read", slow)
    stage.residency.prefetch(version)
    assert begun.wait(10)
    stage.residency.forget(version)
    folder.rename(away)
    may_read.set()
    while stage.residency._loader._done.empty():
        time.sleep(0)
    if comes_back:
        away.rename(folder)
        stage.residency.register(version, str(folder))
    assert stage.settle().failed == {}
    assert stage.residency.knows(version) == comes_back
    if comes_back:
        stage.use(version)

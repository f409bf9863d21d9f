"""What a soak run checks, on runs that are known."""

import asyncio
import mmap
import os
from itertools import islice
from pathlib import Path

import pytest

from perseid_loadtest.soak import NUM_CHURNED, _flat, _named, _of_requests, _plan
from perseid_loadtest.traffic import memory
from perseid_loadtest.traffic.churn import changes
from perseid_loadtest.traffic.memory import Watched, own_mib
from perseid_loadtest.traffic.probes import FIRST, Probes
from perseid_loadtest.traffic.record import ChurnRecord, RequestRecord, Run
from perseid_loadtest.variations import Variations
from perseid_server.adapters.lora import check_adapter
from perseid_server.adapters.store import version_of
from tests.fakes import tiny_spec
from tests.server.stack import write_adapter

PLAN = _plan(("a",))
NOBODY = 2**22 + 1
"""The id of no process."""


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


@pytest.mark.parametrize("mib", [[], [100.0, 100.0]])
def test_too_few_samples_say_nothing(mib):
    check = _flat(Watched("engine", 1, mib))
    assert not check.held
    assert "not enough samples" in check.found


def test_memory_of_this_process_and_of_none():
    assert 5 < own_mib(os.getpid()) < 100_000
    with pytest.raises(ProcessLookupError):
        own_mib(NOBODY)


async def test_a_process_that_goes_is_told_and_the_others_are_watched_on(monkeypatch):
    monkeypatch.setattr(memory, "EVERY_S", 0.0)
    gone, here = Watched("engine process", NOBODY, [100.0] * 9), Watched("API process", os.getpid())
    watching = asyncio.create_task(memory.Memory((gone, here)).watch(after_s=0.0))
    async with asyncio.timeout(30.0):
        while len(here.mib) < 3 and not watching.done():  # noqa: ASYNC110
            await asyncio.sleep(0)
    watching.cancel()
    assert [_flat(gone).held, _flat(here).held] == [False, True]
    assert "ended during the run" in _flat(gone).found


async def test_probes_of_a_server_that_is_gone_are_not_the_same():
    probes = Probes("127.0.0.1:1", PLAN)
    probes._answers = {FIRST: (1, 2)}
    assert await probes.ask_alone() == (0, 1)


def test_memory_of_mapped_files_is_not_a_processs_own(tmp_path):
    """A process that maps and reads a large file holds no more than before; one that fills memory does."""
    file = tmp_path / "large"
    file.write_bytes(b"x" * (64 << 20))
    before = own_mib(os.getpid())
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[place] == ord("x") for place in range(0, len(mapped), mmap.PAGESIZE)) == 64 << 8
        assert own_mib(os.getpid()) - before < 32
    filled = b"y" * (64 << 20)
    assert own_mib(os.getpid()) - before > 32
    del filled


def test_what_churns_is_new_to_every_server_each_time(tmp_path):
    sources = [write_adapter(tmp_path / name, seed=seed) for seed, name in enumerate(("a", "b"))]
    churned = Variations(sources, tmp_path / "made", NUM_CHURNED)
    churn = _named(churned)
    assert len(churn) == NUM_CHURNED
    seen = [version_of(source) for source in sources]
    seen += [version_of(Path(folder)) for (folder,) in churn.values()]
    for change in islice(changes(churn, frozenset(churn)), 30 * NUM_CHURNED):
        churned.renew(change.source)
        seen.append(version_of(Path(change.source)))
    assert len(set(seen)) == len(seen)
    for (folder,) in churn.values():
        assert check_adapter(Path(folder), tiny_spec()).info.rank == 2

"""A loader whose jobs take so many polls, and a pool that is only counted: residency without threads and tensors."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from perseid_server.adapters import residency
from perseid_server.adapters.loader import Done, HostCopy, Read, Write
from perseid_server.adapters.pool import AdapterPool
from perseid_server.adapters.residency import Residency

COPY_BYTES = 100  # of one page


class CountedPool:
    """Pages without content."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> tuple[int, ...] | None:
        if count > self.num_free:
            return None
        taken = tuple(self._free[:count])
        del self._free[:count]
        return taken

    def free(self, pages: Iterable[int]) -> None:
        self._free += pages


@dataclass
class SlowLoader:
    """One job after the other; a read takes `ticks` polls, a write one."""

    ticks: int
    pages: Mapping[str, int]  # of versions that have more than one
    reads: list[str] = field(default_factory=list)
    failures: int = 0  # of the next reads, for a reason that passes
    _jobs: list[Read | Write] = field(default_factory=list)
    _waited: int = 0

    @property
    def num_jobs(self) -> int:
        return len(self._jobs)

    def hand_over(self, job: Read | Write) -> None:
        self._jobs.append(job)

    def done(self) -> Iterator[Done]:
        self._waited += 1
        if self._jobs and self._waited >= (self.ticks if isinstance(self._jobs[0], Read) else 1):
            self._waited = 0
            job = self._jobs.pop(0)
            if isinstance(job, Write):
                yield Done(job)
            elif self.failures:
                self.failures -= 1
                yield Done(job, error="the disk is gone", is_final=False)
            else:
                self.reads.append(job.version)
                yield Done(job, host=self._copy(self.pages.get(job.version, 1)))

    @staticmethod
    def _copy(num_pages: int) -> HostCopy:
        return cast(
            "HostCopy", SimpleNamespace(info=SimpleNamespace(num_pages=num_pages), nbytes=num_pages * COPY_BYTES)
        )


def slow_residency(
    monkeypatch: pytest.MonkeyPatch,
    *,
    device: int,
    host: float,
    ticks: int = 1,
    pages: Mapping[str, int] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Residency, SlowLoader]:
    """With room for so many adapters of one page in either memory."""
    loader = SlowLoader(ticks, pages or {})
    with monkeypatch.context() as patch:
        patch.setattr(residency, "Loader", lambda *_: loader)
        pool = cast("AdapterPool", CountedPool(device))
        return Residency(cast("Any", None), pool, int(host * COPY_BYTES), clock), loader

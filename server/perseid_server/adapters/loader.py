"""The thread that reads adapters from disk and fills pages. It works on what it is handed and decides nothing: it and
the engine's thread share two queues and nothing else, and it touches only pages that were reserved for it.
"""

import logging
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from perseid_server.adapters.lora import AdapterInfo, check_adapter
from perseid_server.adapters.lowering import LoweredLinear, lower, lower_heads
from perseid_server.adapters.pool import AdapterPool
from perseid_server.adapters.state import is_final, why
from perseid_server.adapters.store import version_of
from perseid_server.adapters.untrusted import unreadable
from perseid_server.errors import AdapterRejected, PerseidError
from perseid_server.model.spec import BaseSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HostCopy:
    """An adapter lowered and ready to be copied to the device."""

    info: AdapterInfo
    linears: tuple[LoweredLinear, ...]

    @property
    def nbytes(self) -> int:
        """Host bytes held."""
        return sum(linear.nbytes for linear in self.linears)


@dataclass(frozen=True, slots=True)
class Read:
    """Bring a version to the host."""

    version: str
    path: Path


@dataclass(frozen=True, slots=True)
class Write:
    """Fill pages that are reserved for a version."""

    version: str
    pages: tuple[int, ...]
    host: HostCopy


@dataclass(frozen=True, slots=True)
class Done:
    """How a job ended."""

    job: Read | Write
    host: HostCopy | None = None
    error: str | None = None
    is_final: bool = True  # of an error: it lies in the adapter's files, and trying again would not help


class Loader:
    """Does one job after the other, in the order in which they were handed over."""

    def __init__(self, spec: BaseSpec, pool: AdapterPool) -> None:
        self._spec = spec
        self._pool = pool
        self._num_jobs = 0
        self._jobs: queue.SimpleQueue[Read | Write | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Done] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._load_forever, name="adapter-loader", daemon=True)
        self._thread.start()

    # --- on the engine's thread ---------------------------------------------------------------------------------

    @property
    def num_jobs(self) -> int:
        """Jobs whose end has not been taken over."""
        return self._num_jobs

    def hand_over(self, job: Read | Write) -> None:
        """One more job."""
        self._num_jobs += 1
        self._jobs.put(job)

    def done(self) -> Iterator[Done]:
        """Jobs that have ended since this was last asked."""
        while True:
            try:
                done = self._done.get_nowait()
            except queue.Empty:
                return
            self._num_jobs -= 1
            yield done

    def close(self) -> None:
        """End the thread."""
        self._jobs.put(None)
        self._thread.join()

    # --- on its own thread --------------------------------------------------------------------------------------

    def _load_forever(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._done.put(self._do(job))
            except Exception as error:  # whatever it is, it costs those who wait for this adapter and nobody else
                if not isinstance(error, PerseidError):
                    logger.exception("loading adapter %s failed", job.version[:12])
                self._done.put(Done(job, error=why(error), is_final=is_final(error)))

    def _do(self, job: Read | Write) -> Done:
        if isinstance(job, Read):
            return Done(job, host=self._read(job))
        self._pool.write(job.pages, job.host.linears)
        return Done(job)

    def _read(self, job: Read) -> HostCopy:
        try:
            actual = version_of(job.path)
        except OSError as error:
            raise unreadable("its files", error) from error
        if actual != job.version:
            raise AdapterRejected("its files have changed since it was loaded; load it again")
        checked = check_adapter(job.path, self._spec)
        return HostCopy(checked.info, (*lower(checked, self._spec), *lower_heads(checked, self._spec)))

"""Heads that are registered, and those that a loader thread has brought to the device. Imports no torch."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from perseid_server.adapters.backoff import Backoff
from perseid_server.adapters.state import Location, ResidencyEvents, is_final, why
from perseid_server.errors import PerseidError

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(slots=True)
class _Held(Generic[T]):
    path: Path
    loading: Future[T] | None = None
    heads: T | None = None
    error: str | None = None
    may_pass: bool = False  # the error
    backoff: Backoff = field(default_factory=Backoff)


@dataclass(slots=True)
class HeadsResidency(Generic[T]):
    """All calls come from the engine's thread. Heads are few and small: all that are registered are on the device.

    Nobody waits for them, so what cannot be loaded is logged and told, and costs drafts only. Where the reason may
    pass, it is tried again after a while.
    """

    load: Callable[[Path], T]  # runs on the loader's thread; PerseidError or OSError says why it cannot be done
    clock: Callable[[], float] = time.monotonic  # what heads that failed to load wait on, s
    _held: dict[str, _Held[T]] = field(default_factory=dict)
    _failed: dict[str, str] = field(default_factory=dict)
    _loader: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="heads-loader")
    )

    @property
    def is_loading(self) -> bool:
        """Whether a poll will take something over."""
        return any(held.loading is not None for held in self._held.values())

    def register(self, version: str, path: str) -> None:
        """Load heads, if they are not there or on their way."""
        held = self._held.setdefault(version, _Held(Path(path)))
        held.path = Path(path)
        if held.heads is None and held.loading is None:
            held.error = None
            held.backoff.reset()
            self._load(held)

    def forget(self, version: str) -> None:
        """Let heads go at once; unknown versions are ignored."""
        self._held.pop(version, None)

    def poll(self) -> ResidencyEvents:
        """Take over what has been loaded."""
        moved: list[str] = []
        failed, self._failed = self._failed, {}
        for version, held in self._held.items():
            loading = held.loading
            if loading is None:
                if held.may_pass and held.backoff.is_over(self.clock()):
                    self._load(held)
                continue
            if not loading.done():
                continue
            held.loading = None
            error = loading.exception()
            if error is None:
                held.heads, held.error = loading.result(), None
                held.backoff.reset()
                moved.append(version)
            else:
                failed[version] = self._not_loaded(version, held, error)
        return ResidencyEvents(moved=tuple(moved), failed=failed)

    @property
    def retry_in_s(self) -> float | None:
        """After how long a poll tries some again, though the loader is idle."""
        failed = [held for held in self._held.values() if held.may_pass and held.loading is None]
        now = self.clock()
        return min((held.backoff.left_s(now) for held in failed), default=None)

    def fail(self, version: str, error: str) -> None:
        """Heads that are there do not work: let them go, and tell why at the next poll."""
        held = self._held[version]
        held.heads, held.error = None, error
        self._failed[version] = error

    def knows(self, version: str) -> bool:
        """Whether they are registered."""
        return version in self._held

    def location(self, version: str) -> Location:
        """Where they are."""
        return "device" if self._held[version].heads is not None else "disk"

    def error(self, version: str) -> str | None:
        """Why they cannot be loaded."""
        return self._held[version].error

    def get(self, version: str) -> T | None:
        """The heads, if they are there."""
        held = self._held.get(version)
        return None if held is None else held.heads

    def _load(self, held: _Held[T]) -> None:
        held.may_pass = False
        held.loading = self._loader.submit(self.load, held.path)

    def _not_loaded(self, version: str, held: _Held[T], error: BaseException) -> str:
        """The server goes on without these heads, whatever it was; what to tell."""
        says_why = isinstance(error, PerseidError | OSError)
        logger.error("heads %s cannot be loaded: %s", version[:12], error, exc_info=None if says_why else error)
        held.error, held.may_pass = why(error), not is_final(error)
        held.backoff.failed(self.clock())
        return held.error

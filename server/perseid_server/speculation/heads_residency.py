"""Heads that are registered, and those that a loader thread has brought to the device. Imports no torch."""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from perseid_server.adapters.state import Location, ResidencyEvents, why
from perseid_server.errors import PerseidError

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(slots=True)
class _Held(Generic[T]):
    loading: Future[T] | None = None
    heads: T | None = None
    error: str | None = None


@dataclass(slots=True)
class HeadsResidency(Generic[T]):
    """All calls come from the engine's thread. Heads are few and small: all that are registered are on the device.

    Nobody waits for them, so what cannot be loaded is logged and told, and costs drafts only.
    """

    load: Callable[[Path], T]  # runs on the loader's thread; PerseidError or OSError says why it cannot be done
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
        held = self._held.setdefault(version, _Held())
        if held.heads is None and held.loading is None:
            held.error = None
            held.loading = self._loader.submit(self.load, Path(path))

    def forget(self, version: str) -> None:
        """Let heads go at once; unknown versions are ignored."""
        self._held.pop(version, None)

    def poll(self) -> ResidencyEvents:
        """Take over what has been loaded."""
        moved: list[str] = []
        failed, self._failed = self._failed, {}
        for version, held in self._held.items():
            loading = held.loading
            if loading is None or not loading.done():
                continue
            held.loading = None
            try:
                held.heads = loading.result()
                moved.append(version)
            except (PerseidError, OSError) as error:
                held.error = failed[version] = why(error)
                logger.error("heads %s cannot be loaded: %s", version[:12], error)  # noqa: TRY400  (it says why)
            except Exception as error:  # out of memory, whatever: the server goes on without these heads
                held.error = failed[version] = why(error)
                logger.exception("heads %s cannot be loaded", version[:12])
        return ResidencyEvents(moved=tuple(moved), failed=failed)

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

"""Whether the server can serve: one answer for /ready and for gRPC health."""

import asyncio
from collections.abc import Callable

from perseid_server.frontend.service import GenerationService


class ServerStatus:
    """Follows the engine's status and the service's draining. All methods run on one event loop."""

    def __init__(
        self, service: GenerationService, engine_status: Callable[[], str], engine_trouble: Callable[[], str] = str
    ) -> None:
        """`engine_trouble`: how the last engine process ended, "" while there is no trouble. Whoever knows that the
        engine's status has changed tells it with `changed`."""
        self._service = service
        self._engine_status = engine_status
        self._engine_trouble = engine_trouble
        self._next_change = asyncio.Event()
        service.on_drain(self.changed)

    @property
    def is_ready(self) -> bool:
        """Able to generate now."""
        return self._engine_status() == "ready" and not self._service.draining.has_begun

    def describe(self) -> str:
        """Why it is not ready, in words for everybody; "ready" if it is."""
        if self._service.draining.has_begun:
            return "shutting down"
        if self._engine_status() == "ready":
            return "ready"
        trouble, _, _ = self._engine_trouble().partition(":")  # what follows may name files, and anybody may ask
        return f"engine {self._engine_status()}" + (f": it {trouble}" if trouble else "")

    def changed(self) -> None:
        """Something that it follows has changed."""
        change, self._next_change = self._next_change, asyncio.Event()
        change.set()

    def next_change(self) -> asyncio.Event:
        """Is set at the next change. Who takes it before looking misses none."""
        return self._next_change

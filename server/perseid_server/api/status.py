"""Whether the server can serve: one answer for /ready and for gRPC health."""

from collections.abc import Callable

from perseid_server.frontend.service import GenerationService


class ServerStatus:
    """Follows the engine's status and the service's draining."""

    def __init__(
        self, service: GenerationService, engine_status: Callable[[], str], engine_trouble: Callable[[], str] = str
    ) -> None:
        """`engine_trouble`: how the last engine process ended, "" while there is no trouble."""
        self._service = service
        self._engine_status = engine_status
        self._engine_trouble = engine_trouble

    @property
    def is_ready(self) -> bool:
        """Able to generate now."""
        return self._engine_status() == "ready" and not self._service.draining

    def describe(self) -> str:
        """Why it is not ready."""
        if self._service.draining:
            return "shutting down"
        trouble = self._engine_trouble()
        return f"engine {self._engine_status()}" + (f": it {trouble}" if trouble else "")

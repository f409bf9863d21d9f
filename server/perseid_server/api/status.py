"""Whether the server can serve: one answer for /ready and for gRPC health."""

from collections.abc import Callable

from perseid_server.frontend.service import GenerationService


class ServerStatus:
    """Follows the engine's status and the service's draining."""

    def __init__(self, service: GenerationService, engine_status: Callable[[], str]) -> None:
        self._service = service
        self._engine_status = engine_status

    @property
    def is_ready(self) -> bool:
        """Able to generate now."""
        return self._engine_status() == "ready" and not self._service.draining

    def describe(self) -> str:
        """Why it is not ready."""
        return "shutting down" if self._service.draining else f"engine {self._engine_status()}"

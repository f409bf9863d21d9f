"""What a server that shuts down says to those who come too late."""

from collections.abc import Callable

from perseid_server.errors import Unavailable

RETRY_AFTER_S = 5.0


class Draining:
    """Of what takes requests: from the moment it begins, no more are taken."""

    def __init__(self) -> None:
        self.has_begun = False
        self._on_refusal: Callable[[], None] = lambda: None

    def on_refusal(self, callback: Callable[[], None]) -> None:
        """Be told of each refusal from now on."""
        self._on_refusal = callback

    def begin(self) -> None:
        """Take no more."""
        self.has_begun = True

    def check(self) -> None:
        """Unavailable once it has begun."""
        if self.has_begun:
            self._on_refusal()
            raise Unavailable("the server is shutting down", retry_after_s=RETRY_AFTER_S)

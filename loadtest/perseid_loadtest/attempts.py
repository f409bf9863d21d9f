"""Results cost minutes to get: where one place for them fails, the others still get them."""

import io
import sys
from collections.abc import Callable

from rich.console import Console

from perseid_server.errors import PerseidError


class Attempts:
    """Things to do that must not keep each other from being done; the first error is raised at the end."""

    def __init__(self) -> None:
        self._first: BaseException | None = None

    def do(self, step: Callable[[], object]) -> bool:
        """Whether it succeeded."""
        try:
            step()
        except (Exception, SystemExit) as error:  # noqa: BLE001  raised by `end`; rich exits where nobody reads
            self._first = self._first or error
            return False
        return True

    def end(self) -> None:
        """All is done: raise the first error, if there was one."""
        if isinstance(self._first, OSError):  # of the terminal; those of files name the file already
            raise PerseidError(f"the output cannot be written: {self._first.strerror}") from self._first
        if self._first is not None:
            raise self._first


def stdout_console() -> Console:
    """What the terminal's encoding lacks is a question mark rather than an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    return Console()

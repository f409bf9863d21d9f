"""What files hold that may change while the server runs. Standard library only."""

import logging
from collections.abc import Callable
from typing import Generic, TypeVar

from perseid_server.errors import InvalidRequest

logger = logging.getLogger(__name__)

Content = TypeVar("Content")


class Unreadable(InvalidRequest):
    """A file that cannot be read now. It may be readable in a moment, though nothing about it has changed."""


class Followed(Generic[Content]):
    """Always the content of the last files that could be read and were right. `refresh` from one thread only."""

    def __init__(self, signature: Callable[[], object], read: Callable[[], Content], otherwise: str) -> None:
        """`signature`: another one when a file has changed; `read` raises InvalidRequest, which passes through here;
        `otherwise`: what becomes of a change that is wrong, in the log."""
        self._signature = signature
        self._read = read
        self._otherwise = otherwise
        self._seen: object = signature()
        self._told: set[str] = set()  # what could not be read, since the last time that all could
        self.content = read()

    def refresh(self) -> bool:
        """Read again if a file has changed; whether there is something new. What is wrong is read and logged once, what
        cannot be read is tried again each time."""
        signature = self._signature()
        if signature == self._seen:
            return False
        self._seen = signature  # taken before the files are read: what is written meanwhile is read next time
        try:
            self.content = self._read()
        except Unreadable as error:
            self._seen = object()  # equal to none
            if error.message not in self._told:
                self._tell(error)
            self._told.add(error.message)
            return False
        except InvalidRequest as error:
            self._told.clear()
            self._tell(error)
            return False
        self._told.clear()
        return True

    def _tell(self, error: InvalidRequest) -> None:
        logger.error("%s; %s", error.message, self._otherwise)

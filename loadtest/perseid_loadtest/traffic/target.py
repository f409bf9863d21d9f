"""What the driver needs of a server, whatever it speaks."""

import errno
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from perseid_loadtest.traffic.plan import Request
from perseid_server.errors import PerseidError

MESSAGE_CHARACTERS = 200
CLIENT = "client"
"""The kind of what the load generator itself could not do; the server is not to blame."""
OWN_LIMITS = frozenset({errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL})
"""No file descriptor, or no port, is left for one more connection."""


class Failed(Exception):
    """One request or one load of an adapter did not succeed. `kind` is what errors are counted by."""

    def __init__(self, kind: str, message: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(kind)
        self.kind = kind
        self.message = message[:MESSAGE_CHARACTERS]
        self.retry_after_s = retry_after_s


def kind_of_connection(error: Exception) -> str:
    """What a connection that failed is counted by."""
    return CLIENT if getattr(error, "errno", None) in OWN_LIMITS else "connection"


def words_of(fault: Exception) -> str:
    """What a fault of this program's says, in one line; what was meant for the user stands alone."""
    text = fault.message if isinstance(fault, PerseidError) else f"{type(fault).__name__}: {fault}".removesuffix(": ")
    return " ".join(text.split())[:MESSAGE_CHARACTERS]


@dataclass(slots=True)
class Answer:
    """What has come of an answer so far; it stays when the rest does not come."""

    began: float  # of the run, on the process clock
    arrivals: list[tuple[float, float]] = field(default_factory=list)  # (moment, tokens)
    prompt_tokens: int = 0
    output_tokens: int = 0
    tokens_told: bool = True  # False: the server did not count them, and each chunk of text is taken for one

    def now(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self.began


class Target(Protocol):
    """A server. `open` comes first; the others may be called many at once, and raise Failed."""

    @property
    def address(self) -> str: ...

    @property
    def streams(self) -> bool:
        """Whether answers come in chunks."""
        ...

    @property
    def stops_at_eos(self) -> bool:
        """Whether the server refused to go on after an end token: answers end where it ends them."""
        ...

    @property
    def names(self) -> Sequence[str] | None:
        """Adapters it serves. None: it does not tell, and may serve any."""
        ...

    async def open(self) -> None:
        """Connect. PerseidError, one line, when nothing answers there or it is no server of this kind."""
        ...

    async def close(self) -> None: ...

    async def vocabulary(self) -> Sequence[int] | None:
        """Some tokens that the server knows; None where it does not tell."""
        ...

    async def ask(self, request: Request, answer: Answer) -> None:
        """Send a request and write into `answer` what comes, until it is whole."""
        ...

    async def load(self, name: str, source: str, *, replace: bool) -> None: ...

    async def unload(self, name: str) -> None: ...

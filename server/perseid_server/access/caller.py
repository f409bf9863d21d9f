"""Who calls: what the rest of the server knows of an API key. Standard library only.

A transport finds out who calls, once, and says so for as long as the call runs (`calling`). Whoever decides something
by it is handed the caller, or asks `current_caller()`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from perseid_server.errors import Forbidden

Role = Literal["generate", "admin"]
ROLES: tuple[Role, ...] = ("generate", "admin")


@dataclass(frozen=True, slots=True)
class Caller:
    """One API key's holder. Callers of one tenant share its fair share and its prefix cache."""

    tenant: str = ""  # "" where the server has no keys
    key: str = ""  # the key's name in the operator's file; never the key
    roles: frozenset[Role] = frozenset(ROLES)
    adapters: tuple[str, ...] | None = None  # patterns (`support-*`) of names that exist for it; None: all
    weight: float = 1.0  # of the tenant's share when many want to run

    def sees(self, name: str) -> bool:
        """Whether the name of an adapter, a gate set or heads exists for this caller. The base always does."""
        return self.adapters is None or any(fnmatchcase(name, pattern) for pattern in self.adapters)

    def require(self, role: Role) -> None:
        """Forbidden without the role."""
        if role not in self.roles:
            raise Forbidden(f"the API key {self.key!r} has not the role {role!r}, which this call needs")


ANYONE = Caller()
"""Of a server without keys: all may be done."""

_current: ContextVar[Caller] = ContextVar("caller", default=ANYONE)


def current_caller() -> Caller:
    """Who makes the call that this code runs for."""
    return _current.get()


@contextmanager
def calling(caller: Caller) -> Iterator[None]:
    """What runs inside runs for this caller."""
    token = _current.set(caller)
    try:
        yield
    finally:
        _current.reset(token)


def call_as(caller: Caller) -> None:
    """The rest of this task runs for this caller. For a transport that gives each call a task of its own; streams may
    be closed from another one, where `calling` could not undo what it did."""
    _current.set(caller)

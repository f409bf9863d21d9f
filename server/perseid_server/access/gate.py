"""The one place that decides who comes in: key, role, rate. Standard library only; both transports ask here."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal, Protocol

from perseid_server.access.caller import ANYONE, Caller
from perseid_server.access.keys import Key, KeyRing
from perseid_server.access.limits import Limiter
from perseid_server.errors import Forbidden, Unauthenticated

logger = logging.getLogger(__name__)

Need = Literal["open", "any", "generate", "admin", "operator"]
"""What a call needs: nothing, any key, a role, or the role admin for all that is there.

The last is for what tells of everybody's adapters: a key that only sees some of them must not read it.
"""


class Keys(Protocol):
    """Knows the keys as they are now."""

    @property
    def ring(self) -> KeyRing: ...


class Gate:
    """Without keys everybody comes in."""

    def __init__(
        self,
        keys: Keys | None = None,
        limiter: Limiter | None = None,
        *,
        open_metrics: bool = False,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._keys = keys
        self._wall = wall
        self.limiter = limiter or Limiter()
        self.metrics_need: Need = "open" if open_metrics else "operator"

    def enter(self, secret: str | None, need: Need) -> Caller:
        """Who shows this key, if it is good for the call. Unauthenticated, Forbidden or RateLimited if not; none of
        them repeats what was shown."""
        if self._keys is None or need == "open":
            return ANYONE
        key = self._known(self._keys.ring, secret)
        caller = key.caller
        if need in {"generate", "admin"}:
            caller.require("generate" if need == "generate" else "admin")
        if need == "operator":
            caller.require("admin")
            if caller.adapters is not None:
                raise Forbidden(f"the API key {key.name!r} is for some adapters only, and this call tells of all")
        self.limiter.count_request(key)
        return caller

    def headers(self, caller: Caller) -> Mapping[str, str]:
        """What answers tell of the caller's limits."""
        return self.limiter.headers(caller.key) if caller.key else {}

    def _known(self, ring: KeyRing, secret: str | None) -> Key:
        if not secret:
            raise Unauthenticated("no API key; send it once, as 'Authorization: Bearer KEY'")
        key = ring.find(secret)
        if key is None:
            raise Unauthenticated("the API key is not known here")
        if not key.enabled:
            raise Unauthenticated(f"the API key {key.name!r} has been disabled")
        if key.expires is not None and datetime.fromtimestamp(self._wall(), UTC) >= key.expires:
            raise Unauthenticated(f"the API key {key.name!r} has expired")
        return key


def secret_of(authorization: Sequence[str], x_api_key: Sequence[str] = ()) -> str | None:
    """The key of a call, from the header `Authorization: Bearer KEY`, else from `X-Api-Key`. One that is there twice is
    none: what stands before the server may have looked at the other."""
    if len(authorization) > 1 or len(x_api_key) > 1:
        return None
    for value in authorization:
        scheme, _, secret = value.strip().partition(" ")
        if scheme.lower() == "bearer" and secret.strip():
            return secret.strip()
    return next((value.strip() for value in x_api_key), None)

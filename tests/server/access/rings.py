"""Keys for tests."""

from dataclasses import dataclass, field

from perseid_server.access.caller import Caller
from perseid_server.access.gate import Gate
from perseid_server.access.keys import Allowance, Key, KeyRing, digest_of
from perseid_server.access.limits import Limiter


@dataclass
class Keys:
    """Keys that a test can change."""

    ring: KeyRing = field(default_factory=lambda: KeyRing({}))


def key(name: str, *roles: str, adapters=None, allowance: Allowance | None = None, **more) -> Key:
    """A key whose secret is its name."""
    caller = Caller(name, name, frozenset(roles or ("generate",)), adapters)
    return Key(name, digest_of(name), caller, allowance or Allowance(), **more)


def gate_of(*keys: Key, limiter: Limiter | None = None, **more) -> Gate:
    """A gate that knows these keys."""
    return Gate(Keys(KeyRing({one.name: one for one in keys})), limiter, **more)


def bearer(secret: str) -> dict[str, str]:
    """Headers, or metadata."""
    return {"authorization": f"Bearer {secret}"}

"""API keys: what the operator's file says of each, and which one a client has shown. Standard library only.

A key is 256 random bits, so that its SHA-256 tells nothing of it and one quick hash is enough; passwords would need a
slow one. Only the hash is kept.
"""

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from perseid_server.access.caller import Caller

PREFIX = "psd_"
HASH_PREFIX = "sha256:"
MAX_SECRET = 512


@dataclass(frozen=True, slots=True)
class Allowance:
    """How much one key may ask for; None: as much as it likes."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts and answers together
    tokens_per_day: int | None = None  # days in UTC
    tokens_total: int | None = None


@dataclass(frozen=True, slots=True)
class Key:
    """One entry of the operator's file."""

    name: str
    digest: bytes = field(repr=False)  # SHA-256 of the key
    caller: Caller
    allowance: Allowance = Allowance()
    expires: datetime | None = None  # with a time zone
    enabled: bool = True


@dataclass(frozen=True, slots=True)
class KeyRing:
    """All keys by name."""

    keys: Mapping[str, Key]
    _by_digest: Mapping[bytes, Key] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_digest", {key.digest: key for key in self.keys.values()})

    def find(self, secret: str) -> Key | None:
        """The key that a client has shown, as quickly among many as among few.

        The time that a look-up takes may tell how much of a digest is right, but nobody can use that: who wants a
        secret with a given beginning of its SHA-256 has to try them, and the beginning of a digest says nothing of the
        256 random bits that it was made of.
        """
        return self._by_digest.get(digest_of(secret)) if len(secret) <= MAX_SECRET else None


def new_secret() -> str:
    """A key for a client; it is shown once and kept nowhere."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(secret: str) -> bytes:
    """SHA-256 of a key."""
    return hashlib.sha256(secret.encode(errors="replace")).digest()


def hash_text(secret: str) -> str:
    """The hash as the file has it."""
    return HASH_PREFIX + digest_of(secret).hex()

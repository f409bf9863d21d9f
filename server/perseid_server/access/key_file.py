"""The operator's file of API keys. Standard library only.

[keys.acme-web]                  # the key's name, in logs and metrics
hash = "sha256:…"                # of the key; `perseid keys new` writes it
roles = ["generate"]             # generate, admin; default: generate
tenant = "acme"                  # default: the key's name
adapters = ["acme-*", "shared"]  # names that exist for it; default: all
weight = 2.0                     # of the tenant's share; default: 1
requests_per_minute = 600        # these four default to no limit
tokens_per_minute = 100_000
tokens_per_day = 5_000_000
tokens_total = 100_000_000
expires = 2027-01-31             # the last day, in UTC; or a date and time
enabled = true
"""

import re
import tomllib
from collections.abc import Mapping
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any, cast

from perseid_server.access.caller import ROLES, Caller, Role
from perseid_server.access.followed import Unreadable
from perseid_server.access.keys import HASH_PREFIX, Allowance, Key, KeyRing
from perseid_server.errors import InvalidRequest

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
MAX_FILE_BYTES = 16 << 20
_HASH = re.compile(re.escape(HASH_PREFIX) + "[0-9a-f]{64}")
_LIMITS = ("requests_per_minute", "tokens_per_minute", "tokens_per_day", "tokens_total")
_FIELDS = ("hash", "roles", "tenant", "adapters", "weight", *_LIMITS, "expires", "enabled")
_MAX_TEXT = 128
_MAX_PATTERNS = 1000
_LEAST_WEIGHT, _MAX_WEIGHT = 0.001, 1000.0


class _Wrong(Exception):
    """A field that is not what it should be: (key or None, field or None, why)."""


def read_keys(path: Path) -> KeyRing:
    """All keys of a file. InvalidRequest names the file, the line and the field that is wrong."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise Unreadable(f"--api-keys {path}: cannot be read: {error.strerror}", field="api_keys") from error
    if len(raw) > MAX_FILE_BYTES:
        raise _refusal(path, None, f"is larger than {MAX_FILE_BYTES} bytes")
    try:
        return parse_keys(raw.decode("utf-8"), path)
    except UnicodeDecodeError as error:
        raise _refusal(path, raw.count(b"\n", 0, error.start) + 1, "is not UTF-8") from None


def parse_keys(text: str, path: Path) -> KeyRing:
    """All keys of the file's text. `path` is for messages, none of which repeats what a field holds: it may be a key
    that somebody pasted in place of its hash."""
    try:
        content = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        told = str(error) if isinstance(error, tomllib.TOMLDecodeError) else "nested too deeply"
        line = re.search(r"at line (\d+)", told)
        why = told.partition(" (at ")[0] if _quotes_nothing(told) else "a value cannot be read"
        raise _refusal(path, int(line[1]) if line else None, f"is not TOML: {why}") from None
    try:
        return _ring(content)
    except _Wrong as wrong:
        name, field, why = wrong.args
        where = ".".join(_on_one_line(part) for part in ("keys", name, field) if part)
        raise _refusal(path, line_of(text, name, field), f"{where}: {why}") from None


def line_of(text: str, name: str | None, field: str | None = None) -> int | None:
    """The line on which a key's table begins, or a field of it where it is there."""
    if name is None:
        return None
    header = re.compile(rf"""\s*\[\s*["']?keys["']?\s*\.\s*["']?{re.escape(name)}["']?\s*\]""")
    begin = None
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would take more than TOML for a line's end
        if begin is None:
            begin = number if header.match(line) else None
        elif line.lstrip().startswith("["):
            break
        elif field is not None and re.match(rf"""\s*["']?{re.escape(field)}["']?\s*=""", line):
            return number
    return begin


def _on_one_line(name: str) -> str:
    """TOML allows any character in a quoted key, line breaks and worse among them."""
    return name if name.isprintable() else ascii(name)[1:-1]


def _quotes_nothing(told: str) -> bool:
    """Python quotes short pieces of the file in a few of its messages."""
    return "'" not in told and '"' not in told


def _refusal(path: Path, line: int | None, why: str) -> InvalidRequest:
    at = f", line {line}" if line is not None else ""
    return InvalidRequest(f"--api-keys {path}{at}: {why}", field="api_keys")


def _ring(content: Mapping[str, Any]) -> KeyRing:
    unknown = set(content) - {"keys"}
    if unknown:
        raise _Wrong(None, None, f"expected only tables [keys.NAME], found {min(unknown)[:_MAX_TEXT]!r}")
    tables = content.get("keys", {})
    if not isinstance(tables, dict):
        raise _Wrong(None, None, "expected tables [keys.NAME]")
    keys: dict[str, Key] = {}
    names: dict[bytes, str] = {}
    for name, table in tables.items():
        key = _key(name, table)
        same = names.setdefault(key.digest, name)
        if same != name:
            raise _Wrong(name, "hash", f"the key {same!r} has the same; expected a key of its own")
        keys[name] = key
    return KeyRing(keys)


def _key(name: str, table: Any) -> Key:
    if not NAME.fullmatch(name):
        raise _Wrong(name[:_MAX_TEXT], None, "expected a name of 1 to 64 letters, digits, '_' or '-'")
    if not isinstance(table, dict):
        raise _Wrong(name, None, "expected a table")
    for field in table:
        if field not in _FIELDS:
            raise _Wrong(name, field[:_MAX_TEXT], f"unknown; expected one of {', '.join(_FIELDS)}")
    stated = table.get("hash")
    if not isinstance(stated, str) or not _HASH.fullmatch(stated):
        raise _Wrong(name, "hash", f'expected "{HASH_PREFIX}" and 64 hexadecimal digits; "perseid keys new" writes it')
    enabled = table.get("enabled", True)
    if not isinstance(enabled, bool):
        raise _Wrong(name, "enabled", "expected true or false")
    return Key(
        name,
        bytes.fromhex(stated.removeprefix(HASH_PREFIX)),
        _caller(name, table),
        Allowance(**{field: _limit(name, field, table.get(field)) for field in _LIMITS}),
        _expiry(name, table.get("expires")),
        enabled,
    )


def _caller(name: str, table: Mapping[str, Any]) -> Caller:
    tenant = table.get("tenant", name)
    if not isinstance(tenant, str) or not 0 < len(tenant) <= _MAX_TEXT or not tenant.isprintable():
        raise _Wrong(name, "tenant", f"expected 1 to {_MAX_TEXT} printable characters")
    roles = _texts(name, "roles", table.get("roles", ["generate"]))
    if not roles or set(roles) - set(ROLES):
        raise _Wrong(name, "roles", f"expected a list of {' and '.join(ROLES)}")
    adapters = table.get("adapters")
    weight = table.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not _LEAST_WEIGHT <= weight <= _MAX_WEIGHT:
        raise _Wrong(name, "weight", f"expected a number from {_LEAST_WEIGHT:g} to {_MAX_WEIGHT:g}")
    return Caller(
        tenant=tenant,
        key=name,
        roles=frozenset(cast("Role", role) for role in roles),
        adapters=None if adapters is None else _texts(name, "adapters", adapters),
        weight=float(weight),
    )


def _texts(name: str, field: str, value: Any) -> tuple[str, ...]:
    fits = isinstance(value, list) and len(value) <= _MAX_PATTERNS
    if not fits or not all(isinstance(one, str) and 0 < len(one) <= _MAX_TEXT for one in value):
        raise _Wrong(name, field, f"expected a list of texts of 1 to {_MAX_TEXT} characters")
    return tuple(value)


def _limit(name: str, field: str, value: Any) -> int | None:
    if value is None:
        return None
    if type(value) is not int or not 0 < value < 1 << 53:
        raise _Wrong(name, field, "expected a whole number from 1; leave it out for no limit")
    return value


def _expiry(name: str, value: Any) -> datetime | None:
    """The first moment at which the key is no longer good."""
    if value is None:
        return None
    if isinstance(value, datetime):
        return value if value.tzinfo is not None else value.replace(tzinfo=UTC)
    if isinstance(value, date) and value < date.max:
        return datetime.combine(value + timedelta(days=1), time(), UTC)
    raise _Wrong(name, "expires", "expected a date such as 2027-01-31, without quotes")

"""Changing the operator's file of keys, as `perseid keys` does: whole or not at all. Standard library only."""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path

from perseid_server.access.key_file import NAME, line_of, parse_keys
from perseid_server.access.keys import hash_text, new_secret
from perseid_server.errors import Conflict, InvalidRequest, NotFound

Value = str | int | float | bool | date | Sequence[str]


def add_key(path: Path, name: str, fields: Mapping[str, Value]) -> str:
    """Add a key and return it; the file has its hash only. Comments and the other keys stay.

    Conflict when there is one of that name, InvalidRequest when a field is wrong: then nothing has changed.
    """
    if not NAME.fullmatch(name):
        raise InvalidRequest(f"{name[:64]!r}: expected a name of 1 to 64 letters, digits, '_' or '-'", field="name")
    secret = new_secret()
    with _locked(path):
        before = _read(path)
        if name in parse_keys(before, path).keys:
            raise Conflict(f"{path} has a key {name!r} already; revoke it first, or choose another name", field="name")
        lines = [f"[keys.{name}]", f"hash = {_toml(hash_text(secret))}"]
        lines += [f"{field} = {_toml(value)}" for field, value in fields.items()]
        gap = "\n" if before.endswith("\n") else "\n\n"
        text = (before + gap if before else "") + "\n".join(lines) + "\n"
        parse_keys(text, path)
        _write(path, text)
    return secret


def remove_key(path: Path, name: str) -> None:
    """Take a key out. NotFound when there is none of that name."""
    with _locked(path):
        before = _read(path)
        keys = parse_keys(before, path).keys
        if name not in keys:
            raise NotFound(f"{path} has no key {name[:64]!r}", field="name")
        text = _without(before, name)
        left = parse_keys(text, path).keys if text is not None else keys
        if text is None or left != {other: key for other, key in keys.items() if other != name}:
            raise InvalidRequest(f"{path}: the key {name!r} is not a table [keys.{name}]; take it out by hand")
        _write(path, text)


def _without(text: str, name: str) -> str | None:
    """The text without a key's table, up to the next table."""
    begin = line_of(text, name)
    if begin is None:
        return None
    lines = text.splitlines(keepends=True)
    rest = (place for place in range(begin, len(lines)) if re.match(r"\s*\[", lines[place]))
    return "".join(lines[: begin - 1] + lines[next(rest, len(lines)) :])


def _toml(value: Value) -> str:
    """A value in TOML; its strings are JSON's but for a few that JSON does not escape."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, int | float):
        return repr(value)
    return f"[{', '.join(json.dumps(one) for one in value)}]"


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InvalidRequest(f"--api-keys {path} cannot be read: {why}", field="api_keys") from error


def _write(path: Path, text: str) -> None:
    """Replace the file, for its owner alone. What stood there before kept its owner, as the server may be another."""
    path = path.resolve()  # a link stays a link
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123
            os.fchmod(descriptor, 0o600)
            with contextlib.suppress(OSError):
                before = path.stat()
                os.fchown(descriptor, before.st_uid, before.st_gid)
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InvalidRequest(f"--api-keys {path} cannot be written: {error.strerror}", field="api_keys") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One change at a time. The folder is locked: the file itself is replaced."""
    try:
        folder = os.open(path.resolve().parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise InvalidRequest(f"--api-keys {path}: {error.strerror}: its folder", field="api_keys") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)

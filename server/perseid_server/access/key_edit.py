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
from perseid_server.access.keys import Key, hash_text, new_secret
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
        lines += [_line(field, value) for field, value in fields.items()]
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
        if text is None or not _holds(text, path, {other: key for other, key in keys.items() if other != name}):
            raise InvalidRequest(f"{path}: the key {name!r} is not a table [keys.{name}]; take it out by hand")
        _write(path, text)


def _holds(text: str, path: Path, keys: Mapping[str, Key]) -> bool:
    """Whether the text has just these keys."""
    try:
        return parse_keys(text, path).keys == keys
    except InvalidRequest:
        return False


def _without(text: str, name: str) -> str | None:
    """The text without a key's table. What stands directly above the next table is about that one, and stays."""
    header = line_of(text, name)
    if header is None:
        return None
    lines = [line + "\n" for line in text.split("\n")]
    begin = header - 1
    end = next((place for place in range(header, len(lines)) if re.match(r"\s*\[", lines[place])), len(lines))
    while re.match(r"\s*(#|$)", lines[end - 1]):
        end -= 1
    if end == len(lines) or not lines[end].strip():  # one gap is left, not two
        while begin > 0 and not lines[begin - 1].strip():
            begin -= 1
    left = "".join(lines[:begin] + lines[end:])[:-1]
    return left if begin else left.lstrip("\n")


def _line(field: str, value: Value) -> str:
    line = f"{field} = {_toml(value)}"
    try:
        line.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{field}: expected UTF-8", field=field) from None
    return line


def _toml(value: Value) -> str:
    """A value in TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, int | float):
        return repr(value)
    return f"[{', '.join(map(_string, value))}]"


def _string(text: str) -> str:
    """As in JSON, but for one more character that has to be escaped, and none by a pair of surrogates."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InvalidRequest(f"--api-keys {path} cannot be read: {why}", field="api_keys") from error


def _write(path: Path, text: str) -> None:
    """Replace the file. A new one is for its owner alone."""
    path = path.resolve()  # a link stays a link
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123
            os.fchmod(descriptor, 0o600)
            with contextlib.suppress(OSError):
                _hand_over(descriptor, path.stat())
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InvalidRequest(f"--api-keys {path} cannot be written: {error.strerror}", field="api_keys") from error


def _hand_over(descriptor: int, before: os.stat_result) -> None:
    """To whom the file was before: the server may be another user, or read it through its group."""
    with contextlib.suppress(OSError):
        os.fchown(descriptor, before.st_uid, -1)
    os.fchown(descriptor, -1, before.st_gid)
    os.fchmod(descriptor, before.st_mode & 0o777)  # last: what one group may, another may not


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

"""Files of JSON lines that people write: whatever is wrong is told with its file and line."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from perseid_server.errors import InvalidRequest

T = TypeVar("T")


def read_lines(path: Path, field: str, example: str, parse: Callable[[dict[str, Any]], T]) -> list[T]:
    """What `parse` makes of every line's object; empty lines are passed over.

    InvalidRequest, of `field`, names the file, and the line where `parse` raised one. `example` shows what is expected.
    """
    try:
        lines = path.read_text("utf-8").split("\n")  # splitlines would also split at U+2028, which JSON may hold
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path}: cannot be read: {error}", field=field) from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(parse(_object(line, example)))
            except InvalidRequest as error:
                raise InvalidRequest(f"{path}:{number}: {error.message}", field=field) from error
    if not found:
        raise InvalidRequest(f"{path}: no lines; expected JSON lines such as {example}", field=field)
    return found


def text_field(fields: Mapping[str, Any], key: str, where: str = "") -> str:
    """A text that is not empty. `where` names it in the error, if not `key`."""
    value = fields.get(key)
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"{where or key}: expected text, got {json.dumps(value)[:60]}")
    return value


def _object(line: str, example: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidRequest(f"expected an object such as {example}")
    return fields

"""What a stranger's file says: parsed strictly, quoted briefly. Standard library only."""

import json
import reprlib
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200
_REPR.maxlong = 40
_REPR.maxlevel = 3


def quoted(value: Any) -> str:
    """A value as an error message shows it: its repr, cut where it is long or deep."""
    return _REPR.repr(value)


def parse_json(raw: bytes) -> Any:
    """JSON in UTF-8 that says nothing twice. ValueError says what is wrong."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_each_key_once)
        if b"\\u" in raw:  # an escape may stand for half a character, which no answer could carry
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {quoted(key)} appears twice")
        found[key] = value
    return found

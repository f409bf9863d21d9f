"""Typed reads of a config's fields. A null counts as absent, as in transformers; anything else that is not what was
asked for is refused by name. Imports no torch.
"""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from perseid_server.errors import UnsupportedModel, quoted

Config = Mapping[str, Any]


def positive_int(config: Config, key: str, default: int | None = None, within: str = "") -> int:
    """An integer above 0. Without a default the field must be there; `within` is the config it is nested in."""
    value = _stated(config, key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise wrong(config, key, "a positive integer", within)
    return value


def positive_number(config: Config, key: str, default: float | None = None, within: str = "") -> float:
    """A finite number above 0."""
    value = _stated(config, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not (value > 0 and isfinite(value)):
        raise wrong(config, key, "a positive number", within)
    return float(value)


def number(config: Config, key: str, default: float, within: str = "") -> float:
    """Any finite number."""
    value = _stated(config, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise wrong(config, key, "a finite number", within)
    return float(value)


def integer(config: Config, key: str, default: int, within: str = "") -> int:
    """Any integer."""
    value = _stated(config, key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong(config, key, "an integer", within)
    return value


def flag(config: Config, key: str, default: bool = False, within: str = "") -> bool:
    """true or false."""
    value = _stated(config, key, default)
    if not isinstance(value, bool):
        raise wrong(config, key, "true or false", within)
    return value


def section(config: Config, key: str) -> Config:
    """A nested object; empty where there is none."""
    value = _stated(config, key, {})
    if not isinstance(value, Mapping):
        raise wrong(config, key, "an object")
    return value


def names(config: Config, key: str) -> list[str]:
    """A list of strings; empty where there is none."""
    value = _stated(config, key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise wrong(config, key, "a list of names")
    return value


def token_ids(config: Config, key: str) -> tuple[int, ...]:
    """One token id or a list of them; empty where there is none."""
    value = _stated(config, key, [])
    found = value if isinstance(value, list) else [value]
    if any(isinstance(item, bool) or not isinstance(item, int) for item in found):
        raise wrong(config, key, "a token id or a list of them")
    return tuple(found)


def wrong(config: Config, key: str, expected: str, within: str = "") -> UnsupportedModel:
    """The refusal of a field."""
    name = f"{within}.{key}" if within else key
    return UnsupportedModel(f"{name}: expected {expected}, got {quoted(config.get(key))}", field=within or key)


def _stated(config: Config, key: str, default: Any) -> Any:
    value = config.get(key)
    return default if value is None else value

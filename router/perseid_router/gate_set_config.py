"""gate_set.json, read strictly: every key is known, every value is checked, nothing is said twice."""

import json
import math
import re
import reprlib
import stat
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

CONFIG_FILE = "gate_set.json"
FORMAT = "perseid-gates"
SCHEMA = 1
MAX_COLUMNS = 512
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 100.0
MAX_CONFIG_BYTES = 4 << 20
MAX_NAME = 128
MAX_BASE = 1024
_REQUIRED = ("format", "schema", "adapters")
_OPTIONAL = ("null", "k", "temperature", "method", "base", "request_router", "training")
_VERSION = re.compile(r"[0-9a-f]{64}")
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100
_REPR.maxlong = 40
_REPR.maxlevel = 3

Method = Literal["trained", "meteora", "arrow"]
"""Where the gates come from: trained by Perseid, taken from a MeteoRA checkpoint, or computed without training."""


class GateSetError(ValueError):
    """A gate set that is not what it should be. The message names the field, what was expected and how to mend it."""


@dataclass(frozen=True, slots=True)
class Column:
    """An adapter that gates can choose: the version they were made for, and a name for people."""

    name: str
    version: str  # content hash, as `adapters.store.version_of` computes it


@dataclass(frozen=True, slots=True)
class GateSetConfig:
    """The JSON file."""

    adapters: tuple[Column, ...]
    null: bool = True  # whether the last column is the base
    k: int = 2  # columns a gate chooses, unless a request says otherwise
    temperature: float = 1.0  # of the softmax over the chosen ones, unless a request says otherwise
    method: Method = "trained"
    base: str = ""  # name of the base the gates were trained on
    request_router: dict[str, Any] | None = None  # see request_router.py
    training: dict[str, Any] = field(default_factory=dict)  # what the training reports; for people

    @property
    def num_columns(self) -> int:
        """C, the null column included."""
        return len(self.adapters) + self.null


def read_config(folder: Path) -> GateSetConfig:
    """Read a folder's gate_set.json. GateSetError names the field."""
    path = folder / CONFIG_FILE
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, a device read for ever
            raise GateSetError(f"{CONFIG_FILE} is not a regular file")
        if status.st_size > MAX_CONFIG_BYTES:
            raise GateSetError(f"{CONFIG_FILE} is larger than {MAX_CONFIG_BYTES} bytes")
        return parse_config(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise GateSetError(f"the gate set has no {CONFIG_FILE}; expected a folder that Perseid wrote") from None
    except OSError as error:
        raise GateSetError(f"{CONFIG_FILE} cannot be read: {error.strerror}") from error


def parse_config(raw: bytes) -> GateSetConfig:
    """The configuration from the file's bytes. GateSetError names the field."""
    try:
        found = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_each_key_once,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
        json.dumps(found, ensure_ascii=False).encode("utf-8")  # an escape may stand for half a character
    except RecursionError:
        raise GateSetError(f"{CONFIG_FILE} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise GateSetError(f"{CONFIG_FILE} is not valid JSON: {error}") from error
    check_keys(CONFIG_FILE, found, required=_REQUIRED, optional=_OPTIONAL)
    if found["format"] != FORMAT:
        raise GateSetError(f'format {_quoted(found["format"])}: expected "{FORMAT}"')
    if type(found["schema"]) is not int or found["schema"] != SCHEMA:
        raise GateSetError(f"schema {_quoted(found['schema'])}: this version of Perseid reads {SCHEMA}")
    config = GateSetConfig(
        adapters=_columns(found["adapters"]),
        null=_boolean("null", found.get("null", True)),
        k=check_count("k", found.get("k", 2), 1, MAX_COLUMNS),
        temperature=check_temperature("temperature", found.get("temperature", 1.0)),
        method=_method(found.get("method", "trained")),
        base=_text("base", found.get("base", ""), 0, MAX_BASE),
        request_router=_object_or_none("request_router", found.get("request_router")),
        training=_object_or_none("training", found.get("training")) or {},
    )
    if config.num_columns > MAX_COLUMNS:
        raise GateSetError(f"adapters: {config.num_columns} columns with the base; expected at most {MAX_COLUMNS}")
    return config


def render_config(config: GateSetConfig) -> bytes:
    """The file's bytes. GateSetError where the configuration is one that would be refused when it is read."""
    body = {"format": FORMAT, "schema": SCHEMA} | asdict(config)
    try:
        raw = json.dumps(body, indent=1, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise GateSetError(f"the configuration cannot be written as JSON: {error}") from error
    if len(raw) > MAX_CONFIG_BYTES:
        raise GateSetError(f"the configuration takes {len(raw)} bytes; expected at most {MAX_CONFIG_BYTES}")
    parse_config(raw)
    return raw


def check_keys(field: str, value: Any, *, required: Collection[str], optional: Collection[str] = ()) -> None:
    """Refuse what is no object, lacks a key or has one that is not known."""
    if not isinstance(value, dict):
        raise GateSetError(f"{field}: expected an object, got {type(value).__name__}")
    unknown = [key for key in value if key not in required and key not in optional]
    if unknown:
        known = ", ".join((*required, *optional))
        raise GateSetError(f"{field}: unknown key {_quoted(unknown[0])}; expected {known}; remove it")
    missing = [key for key in required if key not in value]
    if missing:
        raise GateSetError(f"{field}: the key {missing[0]!r} is missing")


def check_count(field: str, value: Any, least: int, most: int) -> int:
    """An integer within limits."""
    if type(value) is not int or not least <= value <= most:
        raise GateSetError(f"{field} {_quoted(value)}: expected an integer from {least} to {most}")
    return value


def check_number(field: str, value: Any) -> float:
    """A finite number."""
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond any float
        pass
    raise GateSetError(f"{field} {_quoted(value)}: expected a finite number")


def check_temperature(field: str, value: Any) -> float:
    number = check_number(field, value)
    if not MIN_TEMPERATURE <= number <= MAX_TEMPERATURE:
        expected = f"a number from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}"
        raise GateSetError(f"{field} {_quoted(value)}: expected {expected}")
    return number


def _columns(value: Any) -> tuple[Column, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_COLUMNS:
        got = f"{len(value)} of them" if isinstance(value, list) else type(value).__name__
        raise GateSetError(f"adapters: expected a list of 1 to {MAX_COLUMNS}, got {got}")
    columns = tuple(_column(f"adapters[{index}]", item) for index, item in enumerate(value))
    first: dict[str, int] = {}
    for index, column in enumerate(columns):
        if first.setdefault(column.version, index) != index:
            raise GateSetError(
                f"adapters[{index}].version {column.version}: the same as adapters[{first[column.version]}]'s; "
                "expected each version once"
            )
    return columns


def _column(field: str, value: Any) -> Column:
    check_keys(field, value, required=("name", "version"))
    version = value["version"]
    if not isinstance(version, str) or not _VERSION.fullmatch(version):
        raise GateSetError(
            f"{field}.version {_quoted(version)}: expected 64 digits 0-9a-f, the hash of the adapter's files"
        )
    return Column(_text(f"{field}.name", value["name"], 1, MAX_NAME), version)


def _text(field: str, value: Any, least: int, most: int) -> str:
    if not isinstance(value, str) or not least <= len(value) <= most or not value.isprintable():
        raise GateSetError(f"{field} {_quoted(value)}: expected {least} to {most} printable characters")
    return value


def _boolean(field: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise GateSetError(f"{field} {_quoted(value)}: expected true or false")
    return value


def _method(value: Any) -> Method:
    methods: tuple[Method, ...] = get_args(Method)
    for method in methods:
        if value == method:
            return method
    raise GateSetError(f"method {_quoted(value)}: expected one of {', '.join(methods)}")


def _object_or_none(field: str, value: Any) -> dict[str, Any] | None:
    if value is not None and not isinstance(value, dict):
        raise GateSetError(f"{field}: expected an object or null, got {type(value).__name__}")
    return value


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {_quoted(key)} appears twice")
        found[key] = value
    return found


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {_quoted(text)} is too large")
    return number


def _quoted(value: Any) -> str:
    return _REPR.repr(value)

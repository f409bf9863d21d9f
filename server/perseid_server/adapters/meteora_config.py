"""`meteora.json`: what a MeteoRA checkpoint does not say of itself, read strictly.

    {"adapters": [{"name": "sql", "rank": 8, "alpha": 16, "rslora": false, "modules": ["q_proj", …]}, …],
     "k": 2, "temperature": 1.0, "base": "Meta-Llama-3-8B"}

`adapters` stand in the order of the gates' rows. `rslora` is false where missing, `modules` all projections, k 2,
temperature 1 (the reference code's defaults). Rank and alpha have no default: the checkpoint holds neither ranks nor
scales; the reference code takes both from each adapter's own adapter_config.json (`lora_alpha / r`), so copy them from
there.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perseid_router.gate_set_config import (
    MAX_COLUMNS,
    GateSetError,
    check_count,
    check_keys,
    check_number,
    check_temperature,
)
from perseid_server.adapters.lora_config import MAX_RANK, MAX_TEXT
from perseid_server.adapters.names import check_name
from perseid_server.adapters.untrusted import MAX_CONFIG_BYTES, parse_json, read_small, unreadable
from perseid_server.errors import AdapterRejected, InvalidRequest, quoted
from perseid_server.model.spec import BaseSpec

CONFIG_FILE = "meteora.json"
EXAMPLE = '{"adapters": [{"name": "sql", "rank": 8, "alpha": 16}, …], "k": 2}'


@dataclass(frozen=True, slots=True)
class MeteoraAdapter:
    """One adapter of the checkpoint."""

    name: str
    rank: int
    alpha: float
    rslora: bool
    modules: tuple[str, ...]  # projections that have rows for it


@dataclass(frozen=True, slots=True)
class MeteoraConfig:
    """The file."""

    adapters: tuple[MeteoraAdapter, ...]
    k: int
    temperature: float
    base: str


def read_meteora_config(folder: Path, base: BaseSpec) -> MeteoraConfig:
    """Read and check a folder's meteora.json. AdapterRejected names the key."""
    try:
        return _parse(_load(folder / CONFIG_FILE), base)
    except GateSetError as error:
        raise AdapterRejected(f"{CONFIG_FILE}: {error}") from error


def _load(path: Path) -> Any:
    try:
        return parse_json(read_small(path, MAX_CONFIG_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        raise AdapterRejected(
            f"the checkpoint has no {CONFIG_FILE}: its tensors tell neither the adapters' ranks nor their scales; "
            f"write {EXAMPLE} with r and lora_alpha of each adapter's adapter_config.json, in the order of the gates' "
            "rows"
        ) from None
    except OSError as error:
        raise unreadable(CONFIG_FILE, error) from error
    except ValueError as error:
        raise AdapterRejected(f"{CONFIG_FILE} is not valid JSON: {error}") from error


def _parse(found: Any, base: BaseSpec) -> MeteoraConfig:
    check_keys("the file", found, required=("adapters",), optional=("k", "temperature", "base"))
    items = found["adapters"]
    if not isinstance(items, list) or not 1 <= len(items) <= MAX_COLUMNS:
        raise GateSetError(f"adapters {quoted(items)}: expected a list of 1 to {MAX_COLUMNS}")
    adapters = tuple(_adapter(f"adapters[{index}]", item, base) for index, item in enumerate(items))
    names = [adapter.name.lower() for adapter in adapters]  # they become folders
    for index, name in enumerate(names):
        if name in names[:index]:
            raise GateSetError(f"adapters[{index}].name {adapters[index].name!r}: expected each name once")
    temperature = check_temperature("temperature", found.get("temperature", 1.0))
    trained_on = found.get("base", "")
    if not isinstance(trained_on, str) or len(trained_on) > MAX_TEXT or not trained_on.isprintable():
        raise GateSetError(f"base {quoted(trained_on)}: expected the name of the base, at most {MAX_TEXT} characters")
    return MeteoraConfig(adapters, check_count("k", found.get("k", 2), 1, MAX_COLUMNS), temperature, trained_on)


def _adapter(field: str, value: Any, base: BaseSpec) -> MeteoraAdapter:
    check_keys(field, value, required=("name", "rank", "alpha"), optional=("rslora", "modules"))
    name, rslora = value["name"], value.get("rslora", False)
    try:
        if not isinstance(name, str) or "/" in check_name(name):
            raise GateSetError(f"{field}.name {quoted(name)}: expected a name without '/'")
    except InvalidRequest as error:
        raise GateSetError(f"{field}: {error.message}") from error
    if not isinstance(rslora, bool):
        raise GateSetError(f"{field}.rslora {quoted(rslora)}: expected true or false")
    return MeteoraAdapter(
        name,
        check_count(f"{field}.rank", value["rank"], 1, MAX_RANK),
        check_number(f"{field}.alpha", value["alpha"]),
        rslora,
        _modules(f"{field}.modules", value.get("modules"), base),
    )


def _modules(field: str, value: Any, base: BaseSpec) -> tuple[str, ...]:
    if value is None:
        return tuple(base.projections)
    known = isinstance(value, list) and value and all(isinstance(item, str) for item in value)
    if not known or not set(value) <= set(base.projections) or len(set(value)) != len(value):
        raise GateSetError(f"{field} {quoted(value)}: expected a list of some of {', '.join(base.projections)}")
    return tuple(name for name in base.projections if name in value)

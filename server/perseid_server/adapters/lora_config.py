"""`adapter_config.json` of a PEFT LoRA, read strictly: what would change the mathematics and is not supported is
refused by the name of its key; an unknown key that says something is refused too."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perseid_server.errors import AdapterRejected

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 4 << 20
MAX_RANK = 256
MAX_PATTERN_KEYS = 4096
MAX_EXPRESSIONS = 64

_PLAIN_NAME = re.compile(r"[\w.]+")

_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", None)
"""Values of init_lora_weights that leave the base as it was. The others keep a part of the base's weights in the
adapter, which PEFT's conversion (`path_initial_model_for_weight_conversion`) turns into a plain adapter."""

_HARMLESS = frozenset(
    {
        "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "r",
        "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora", "rank_pattern",
        "alpha_pattern", "layers_to_transform", "layers_pattern", "init_lora_weights", "runtime_config",
        "eva_config", "corda_config", "lora_ga_config", "peft_version", "ensure_weight_tying", "megatron_core",
        "arrow_config", "qalora_group_size", "velora_config", "monteclora_config", "use_bdlora", "loftq_config",
    }
)  # fmt: skip
"""Keys that are read here, or that say nothing about the forward pass of a plain LoRA."""

_MUST_BE_UNSET = {
    "use_dora": "DoRA is not supported yet",
    "use_qalora": "QALoRA is not supported yet",
    "lora_bias": "a bias on lora_B is not supported yet",
    "fan_in_fan_out": "it belongs to Conv1D layers, which no supported base has",
    "modules_to_save": "fully trained modules are not supported yet",
    "trainable_token_indices": "trained token embeddings are not supported yet",
    "layer_replication": "it changes the depth of the base",
    "megatron_config": "Megatron layers are not supported",
    "alora_invocation_tokens": "activated LoRA is not supported yet",
    "target_parameters": "LoRA on bare parameters (mixture-of-experts layers) is not supported",
    "use_bdlora": "block-diagonal LoRA is not supported yet",
    "arrow_config": "Arrow routing is not supported yet",
    "kasa_config": "KaSA changes the base's weights",
    "loftq_config": "LoftQ changes the base; convert the adapter to a plain LoRA with PEFT first",
    "monteclora_config": "MonteCLoRA is not supported",
    "velora_config": "VeLoRA is not supported",
}


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What decides ranks and scales. Patterns and targets as PEFT writes them."""

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: tuple[str, ...] | str | None  # names, a regular expression, or "all-linear"
    trained_on: str | None

    def rank_of(self, module: str) -> int:
        """Rank of a module such as `model.layers.3.mlp.up_proj`."""
        return self.rank_pattern.get(_matching_key(self.rank_pattern, module), self.rank)

    def scale_of(self, module: str) -> float:
        """α/r, or α/√r with rsLoRA (arXiv:2312.03732), with the module's own rank and α."""
        rank = self.rank_of(module)
        alpha = self.alpha_pattern.get(_matching_key(self.alpha_pattern, module), self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    @property
    def named_targets(self) -> tuple[str, ...]:
        """Target modules given by name; empty for a regular expression or "all-linear"."""
        return self.target_modules if isinstance(self.target_modules, tuple) else ()


def read_lora_config(folder: Path) -> LoraConfig:
    """Read and check a folder's adapter_config.json. AdapterRejected names the key."""
    raw = _load(folder)
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise AdapterRejected(f"peft_type {kind!r} is not supported; supported: LORA (plain LoRA and rsLoRA)")
    if raw.get("bias", "none") != "none":
        raise AdapterRejected(f'bias {raw["bias"]!r}: trained biases are not supported yet; expected "none"')
    for key, why in _MUST_BE_UNSET.items():
        if not _is_unset(raw.get(key)):
            raise AdapterRejected(f"{key} {raw[key]!r}: {why}")
    _refuse_mutating_init(raw.get("init_lora_weights"))
    for key, value in raw.items():
        if key not in _HARMLESS and key not in _MUST_BE_UNSET and key != "bias" and not _is_unset(value):
            raise AdapterRejected(
                f"unknown key {key!r} in {CONFIG_FILE}: it may change what the adapter computes; "
                "remove it if it does not"
            )
    rslora = raw.get("use_rslora", False)
    if not isinstance(rslora, bool):
        raise AdapterRejected(f"use_rslora {rslora!r}: expected true or false")
    return LoraConfig(
        rank=_rank("r", raw.get("r", 8)),
        alpha=_number("lora_alpha", raw.get("lora_alpha", 8)),
        rslora=rslora,
        rank_pattern={key: _rank(f"rank_pattern[{key!r}]", value) for key, value in _pattern(raw, "rank_pattern")},
        alpha_pattern={key: _number(f"alpha_pattern[{key!r}]", value) for key, value in _pattern(raw, "alpha_pattern")},
        target_modules=_targets(raw.get("target_modules")),
        trained_on=_text_or_none("base_model_name_or_path", raw.get("base_model_name_or_path")),
    )


def _load(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise AdapterRejected(f"{CONFIG_FILE} is larger than {MAX_CONFIG_BYTES} bytes")
        raw = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise AdapterRejected(f"the adapter has no {CONFIG_FILE}; expected a PEFT adapter folder") from None
    except OSError as error:
        raise AdapterRejected(f"{CONFIG_FILE} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise AdapterRejected(f"{CONFIG_FILE} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise AdapterRejected(f"{CONFIG_FILE}: expected an object, got {type(raw).__name__}")
    return raw


def _is_unset(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {}, ())


def _refuse_mutating_init(value: Any) -> None:
    if isinstance(value, list | dict) or value not in _PLAIN_INITS:
        raise AdapterRejected(
            f"init_lora_weights {value!r}: this initialisation changes the base's weights, so the adapter alone is not "
            "enough; save it again with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA"
        )


def _rank(field: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise AdapterRejected(f"{field} {value!r}: expected an integer from 1 to {MAX_RANK}")
    return value


def _number(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterRejected(f"{field} {value!r}: expected a finite number")
    return float(value)


def _text_or_none(field: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise AdapterRejected(f"{field} {value!r}: expected a string")
    return value


def _pattern(raw: Mapping[str, Any], field: str) -> list[tuple[str, Any]]:
    value = raw.get(field) or {}
    if not isinstance(value, dict):
        raise AdapterRejected(f"{field} {value!r}: expected an object of module pattern → number")
    if len(value) > MAX_PATTERN_KEYS:
        raise AdapterRejected(f"{field} has {len(value)} keys; expected at most {MAX_PATTERN_KEYS}")
    expressions = [key for key in value if not _PLAIN_NAME.fullmatch(key)]
    if len(expressions) > MAX_EXPRESSIONS:
        raise AdapterRejected(f"{field} has {len(expressions)} expressions; expected at most {MAX_EXPRESSIONS}")
    for expression in expressions:
        _check_expression(field, expression)
    return list(value.items())


def _check_expression(field: str, expression: str) -> None:
    """An expression from a file may be made to take for ever: no repeated groups, few repetitions."""
    if len(expression) > 256 or re.search(r"\)\s*[*+?{]", expression) or len(re.findall(r"[*+{]", expression)) > 2:
        raise AdapterRejected(
            f"{field} {expression[:80]!r}: expected a module name or a simple expression "
            "(at most two repetitions, no repeated groups)"
        )
    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterRejected(f"{field} {expression[:80]!r} is not a regular expression: {error}") from error


def _targets(value: Any) -> tuple[str, ...] | str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise AdapterRejected(f"target_modules {value!r}: expected a list of module names or a regular expression")


def _matching_key(pattern: Mapping[str, Any], module: str) -> str:
    """The first key that is the module's name or, as an expression, a dotted end of it (PEFT: get_pattern_key)."""
    for key in pattern:
        if _PLAIN_NAME.fullmatch(key):
            if module == key or module.endswith(f".{key}"):
                return key
        elif re.match(rf"(.*\.)?({key})$", module):
            return key
    return module

"""`adapter_config.json` of a PEFT LoRA, read strictly: what would change the mathematics and is not supported is
refused by the name of its key; an unknown key that says something is refused too."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from perseid_server.adapters.module_pattern import ModulePattern
from perseid_server.adapters.untrusted import MAX_CONFIG_BYTES, parse_json, read_small, unreadable
from perseid_server.errors import AdapterRejected, quoted

CONFIG_FILE = "adapter_config.json"
MAX_RANK = 256
MAX_PATTERN_KEYS = 4096
MAX_EXPRESSION_CHARACTERS = 4096  # of one pattern's keys that are more than names
MAX_TEXT = 1024

T = TypeVar("T")
Patterns = tuple[tuple[ModulePattern, T], ...]

_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica", None)
"""Values of init_lora_weights that leave the base as it was. The others keep a part of the base's weights in the
adapter, which PEFT's conversion (`path_initial_model_for_weight_conversion`) turns into a plain adapter."""

_HARMLESS = frozenset(
    {
        "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "r",
        "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora", "rank_pattern",
        "alpha_pattern", "layers_to_transform", "layers_pattern", "init_lora_weights", "runtime_config",
        "eva_config", "corda_config", "lora_ga_config", "peft_version", "ensure_weight_tying", "megatron_core",
        "qalora_group_size",
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
    """What decides ranks and scales."""

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Patterns[int]
    alpha_pattern: Patterns[float]
    named_targets: tuple[str, ...]  # modules that must be adapted; empty when the config does not name them one by one
    trained_on: str | None

    def rank_of(self, module: str) -> int:
        """Rank of a module such as `model.layers.3.mlp.up_proj`."""
        return _first_match(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str, rank: int) -> float:
        """α/r, or α/√r with rsLoRA (arXiv:2312.03732), with the module's own α."""
        alpha = _first_match(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def read_lora_config(folder: Path) -> LoraConfig:
    """Read and check a folder's adapter_config.json. AdapterRejected names the key."""
    raw = _load(folder)
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise AdapterRejected(f"peft_type {quoted(kind)} is not supported; supported: LORA (plain LoRA and rsLoRA)")
    if raw.get("bias", "none") != "none":
        raise AdapterRejected(f'bias {quoted(raw["bias"])}: trained biases are not supported yet; expected "none"')
    for key, why in _MUST_BE_UNSET.items():
        if not _is_unset(raw.get(key)):
            raise AdapterRejected(f"{key} {quoted(raw[key])}: {why}")
    _refuse_mutating_init(raw.get("init_lora_weights"))
    for key, value in raw.items():
        if key not in _HARMLESS and key not in _MUST_BE_UNSET and key != "bias" and not _is_unset(value):
            raise AdapterRejected(
                f"unknown key {quoted(key)} in {CONFIG_FILE}: it may change what the adapter computes; "
                "remove it if it does not"
            )
    rslora = raw.get("use_rslora", False)
    if not isinstance(rslora, bool):
        raise AdapterRejected(f"use_rslora {quoted(rslora)}: expected true or false")
    return LoraConfig(
        rank=_rank("r", raw.get("r", 8)),
        alpha=_number("lora_alpha", raw.get("lora_alpha", 8)),
        rslora=rslora,
        rank_pattern=_patterns("rank_pattern", raw.get("rank_pattern"), _rank),
        alpha_pattern=_patterns("alpha_pattern", raw.get("alpha_pattern"), _number),
        named_targets=_named_targets(raw.get("target_modules"), excludes=not _is_unset(raw.get("exclude_modules"))),
        trained_on=_text_or_none("base_model_name_or_path", raw.get("base_model_name_or_path")),
    )


def _load(folder: Path) -> dict[str, Any]:
    try:
        raw = parse_json(read_small(folder / CONFIG_FILE, MAX_CONFIG_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        raise AdapterRejected(f"the adapter has no {CONFIG_FILE}; expected a PEFT adapter folder") from None
    except OSError as error:
        raise unreadable(CONFIG_FILE, error) from error
    except ValueError as error:
        raise AdapterRejected(f"{CONFIG_FILE} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise AdapterRejected(f"{CONFIG_FILE}: expected an object, got {type(raw).__name__}")
    return raw


def _is_unset(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {}, ())


def _refuse_mutating_init(value: Any) -> None:
    if isinstance(value, list | dict) or value not in _PLAIN_INITS:
        raise AdapterRejected(
            f"init_lora_weights {quoted(value)}: this initialisation changes the base's weights, so the adapter alone "
            "is not enough; save it again with PEFT's path_initial_model_for_weight_conversion: that makes a plain LoRA"
        )


def _rank(field: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise AdapterRejected(f"{field} {quoted(value)}: expected an integer from 1 to {MAX_RANK}")
    return value


def _number(field: str, value: Any) -> float:
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond any float
        pass
    raise AdapterRejected(f"{field} {quoted(value)}: expected a finite number")


def _text_or_none(field: str, value: Any) -> str | None:
    if value is not None and (not isinstance(value, str) or len(value) > MAX_TEXT):
        raise AdapterRejected(f"{field} {quoted(value)}: expected a string of at most {MAX_TEXT} characters")
    return value


def _patterns(field: str, value: Any, parse: Callable[[str, Any], T]) -> Patterns[T]:
    """rank_pattern or alpha_pattern: module name or expression → number."""
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise AdapterRejected(f"{field} {quoted(value)}: expected an object of module pattern → number")
    if len(value) > MAX_PATTERN_KEYS:
        raise AdapterRejected(f"{field} has {len(value)} keys; expected at most {MAX_PATTERN_KEYS}")
    patterns = [(_pattern(field, key), parse(f"{field}[{quoted(key)}]", item)) for key, item in value.items()]
    length = sum(len(pattern.key) for pattern, _ in patterns if not pattern.is_name)
    if length > MAX_EXPRESSION_CHARACTERS:
        raise AdapterRejected(
            f"{field} holds expressions of {length} characters in all; expected at most {MAX_EXPRESSION_CHARACTERS}"
        )
    return tuple(patterns)


def _pattern(field: str, key: str) -> ModulePattern:
    try:
        return ModulePattern.parse(key)
    except ValueError as error:
        raise AdapterRejected(f"{field} {quoted(key)}: expected a module name or an expression: {error}") from error


def _first_match(patterns: Patterns[T], module: str, otherwise: T) -> T:
    """What the first pattern that matches says, as in PEFT."""
    return next((value for pattern, value in patterns if pattern.matches(module)), otherwise)


def _named_targets(value: Any, *, excludes: bool) -> tuple[str, ...]:
    """Target modules given by name. None for an expression, "all-linear", or where exclude_modules takes some away."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return () if excludes else tuple(value)
    if value is None or isinstance(value, str):
        return ()
    raise AdapterRejected(f"target_modules {quoted(value)}: expected a list of module names or a regular expression")

"""PEFT folders for the tests: a valid one by default, and whatever is wrong with it when asked."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from perseid_server.adapters.lora import WEIGHTS_FILE, Site
from perseid_server.adapters.lora_config import CONFIG_FILE
from perseid_server.model.spec import BaseSpec
from tests.fakes import tiny_spec

RANK = 4
TARGETS = ("q_proj", "v_proj", "down_proj")


def tensor_name(layer: int, projection: str, side: str) -> str:
    """As PEFT writes it."""
    return f"base_model.model.{Site(layer, projection).module}.lora_{side}.weight"


Q_A, Q_B = tensor_name(0, "q_proj", "A"), tensor_name(0, "q_proj", "B")


def lora_tensors(
    base: BaseSpec, *, rank: int = RANK, targets: tuple[str, ...] = TARGETS, seed: int = 0
) -> dict[str, np.ndarray]:
    """Random A and B for every target of every layer."""
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in range(base.num_layers):
        for target in targets:
            shape = base.projections[target]
            tensors[tensor_name(layer, target, "A")] = random.normal(size=(rank, shape.in_features)).astype("f4")
            tensors[tensor_name(layer, target, "B")] = random.normal(size=(shape.out_features, rank)).astype("f4")
    return tensors


def lora_config(**changes: object) -> dict[str, object]:
    """What PEFT writes for a plain LoRA, the fields that matter."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "someone/tiny",
        "r": RANK,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "target_modules": list(TARGETS),
        "bias": "none",
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "use_dora": False,
        "modules_to_save": None,
        "peft_version": "0.18.0",
    } | changes


def write_adapter(
    folder: Path,
    *,
    tensors: Mapping[str, np.ndarray] | None = None,
    config: object = None,
    seed: int = 0,
    base: BaseSpec | None = None,
    rank: int = RANK,
) -> Path:
    """An adapter of the tiny base; `config` and `tensors` take the place of the valid ones."""
    folder.mkdir(parents=True, exist_ok=True)
    config = lora_config(r=rank) if config is None else config
    (folder / CONFIG_FILE).write_text(config if isinstance(config, str) else json.dumps(config))
    tensors = lora_tensors(base or tiny_spec(), rank=rank, seed=seed) if tensors is None else tensors
    save_file(dict(tensors), folder / WEIGHTS_FILE)
    return folder

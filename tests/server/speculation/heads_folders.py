"""Medusa heads for the tests, in each of the layouts that are about."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from perseid_server.model.spec import BaseSpec
from perseid_server.speculation.heads_config import CONFIG_FILE, TENSORS_FILE, HeadsConfig, render_config
from tests.fakes import tiny_spec

Tensors = dict[str, np.ndarray]


def medusa_v2(
    num_heads: int = 3, num_layers: int = 1, *, bias: bool = True, seed: int = 0, base: BaseSpec | None = None
) -> Tensors:
    """Residual blocks alone: the logits are the base's lm_head's."""
    size, random = (base or tiny_spec()).hidden_size, np.random.default_rng(seed)
    tensors = {}
    for head in range(num_heads):
        for layer in range(num_layers):
            tensors[f"{head}.{layer}.linear.weight"] = random.normal(size=(size, size)).astype("f4")
            if bias:
                tensors[f"{head}.{layer}.linear.bias"] = random.normal(size=size).astype("f4")
    return tensors


def medusa_v1(num_heads: int = 3, num_layers: int = 1, *, rows: int | None = None, seed: int = 0) -> Tensors:
    """Each head with an lm_head of its own."""
    base, random = tiny_spec(), np.random.default_rng(seed + 1)
    shape = (rows or base.vocab_size, base.hidden_size)
    own = {f"{head}.{num_layers}.weight": random.normal(size=shape).astype("f4") for head in range(num_heads)}
    return medusa_v2(num_heads, num_layers, seed=seed) | own


def vllm(num_heads: int = 3, *, rows: int | None = None, shared: bool = False, seed: int = 0) -> Tensors:
    """vLLM's names, without biases; `shared`: one lm_head for all heads."""
    v1 = medusa_v1(num_heads, rows=rows, seed=seed)
    tensors = {f"blocks.{head}.layers.0.weight": v1[f"{head}.0.linear.weight"] for head in range(num_heads)}
    if shared:
        return tensors | {"lm_head.weight": v1["0.1.weight"]}
    return tensors | {f"lm_heads.{head}.weight": v1[f"{head}.1.weight"] for head in range(num_heads)}


def write_heads(
    folder: Path,
    tensors: Mapping[str, np.ndarray] | None = None,
    *,
    config: HeadsConfig | None = None,
    file: str = TENSORS_FILE,
    seed: int = 0,
) -> Path:
    """A folder with heads, Medusa v2's unless told otherwise; `config` writes perseid_heads.json too."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(medusa_v2(seed=seed) if tensors is None else tensors), folder / file)
    if config is not None:
        (folder / CONFIG_FILE).write_bytes(render_config(config))
    return folder

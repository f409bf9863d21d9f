"""A MeteoRA checkpoint for the tests."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from perseid_server.model.spec import BaseSpec
from tests.fakes import tiny_spec

RANKS = {"sql": 2, "sums": 3}


def write_meteora(folder: Path, *, config: bool = True, spoil: str | None = None, base: BaseSpec | None = None) -> Path:
    """A checkpoint of two adapters of unequal rank on q_proj. `spoil`: a tensor that gets a NaN."""
    base, random, total = base or tiny_spec(), np.random.default_rng(0), sum(RANKS.values())
    shape = base.projections["q_proj"]
    tensors = {}
    for layer in range(base.num_layers):
        sizes = {
            "lora_A": (total, shape.in_features),
            "lora_B": (shape.out_features, total),
            "moe_gate": (len(RANKS), shape.in_features),
        }
        for part, size in sizes.items():
            tensors[f"model.layers.{layer}.self_attn.q_proj.{part}.weight"] = random.standard_normal(size).astype("f4")
    if spoil is not None:
        tensors[f"model.layers.1.self_attn.q_proj.{spoil}.weight"][0, 0] = np.nan
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    if config:
        adapters = [{"name": name, "rank": rank, "alpha": 4, "modules": ["q_proj"]} for name, rank in RANKS.items()]
        (folder / "meteora.json").write_text(json.dumps({"adapters": adapters, "k": 2}))
    return folder

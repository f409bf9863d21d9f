"""A gate set with random gates for the embedded base."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

LAYERS = 30
WIDTHS = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), 576) | {"down_proj": 1536}


def write_gates(
    folder: Path, columns: Mapping[str, str], *, null: bool, ungated: Sequence[str] = (), null_bias: float = 0.0
) -> Path:
    """Random gates: logits of a size near 3 for inputs of a size near 1, and larger where inputs are."""
    folder.mkdir()
    config = {
        "format": "perseid-gates",
        "schema": 1,
        "adapters": [{"name": name, "version": version} for name, version in columns.items()],
        "null": null,
        "k": 2,
        "temperature": 1.0,
        "method": "trained",
        "base": "SmolLM2-135M-Instruct",
    }
    (folder / "gate_set.json").write_text(json.dumps(config))
    rng = np.random.default_rng(len(columns))
    tensors = {}
    for layer in range(LAYERS):
        for projection, width in WIDTHS.items():
            name = f"layers.{layer}.{projection}"
            rows = rng.standard_normal((len(columns) + null, width)).astype(np.float32)
            if name not in ungated:
                tensors[f"{name}.weight"] = 3 * rows / width**0.5
                tensors[f"{name}.bias"] = np.array([0.0] * len(columns) + [null_bias] * null, np.float32)
    save_file(tensors, folder / "gates.safetensors")
    return folder

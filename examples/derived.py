"""Adapters derived from the example adapters, where more are needed than were trained.

    s·B A = U S Vᵀ  →  U P S Qᵀ Vᵀ + N        P, Q: random orthogonal matrices [r, r], N: noise of rank e

The trained adapter's singular values S and the subspaces it reads and writes stay; which direction meets which, and
how strongly, is drawn anew. N has a fixed share of its norm and widens the subspaces. Derived adapters solve nothing.
What they have of real ones is the place (linears and layers), the size and the spectrum.
"""

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
NOISE_SHARE = 0.3  # ‖N‖ / ‖s·B A‖
MOST_EXTRA_RANK = 6

Matrix = NDArray[np.float32]


def adapter_folders(names: Sequence[str], trained: Path, scratch: Path) -> dict[str, Path]:
    """A folder for each name: the trained adapter of that name, else one derived from the trained ones in turn."""
    sources = sorted(folder for folder in trained.iterdir() if (folder / CONFIG_FILE).is_file())
    folders = {}
    num_derived = 0
    for name in names:
        folder = trained / name
        if folder not in sources:
            folder = derive(sources[num_derived % len(sources)], scratch / name)
            num_derived += 1
        folders[name] = folder
    return folders


def derive(source: Path, target: Path) -> Path:
    """Write an adapter derived from `source` to `target`, whose name is the seed."""
    rng = np.random.default_rng(zlib.crc32(target.name.encode()))
    extra = int(rng.integers(1, MOST_EXTRA_RANK + 1))
    config: dict[str, Any] = json.loads((source / CONFIG_FILE).read_text())
    tensors: Mapping[str, Matrix] = {name: t.astype(np.float32) for name, t in load_file(source / WEIGHTS_FILE).items()}
    derived: dict[str, NDArray[np.float16]] = {}  # in C's order: save_file takes no heed of another
    for name in sorted(name for name in tensors if ".lora_A." in name):
        partner = name.replace(".lora_A.", ".lora_B.")
        a, b = _derived_pair(tensors[name], tensors[partner] * _scale(config, name), extra, rng)
        derived[name], derived[partner] = (side.astype(np.float16, order="C") for side in (a, b))
    target.mkdir(parents=True, exist_ok=True)
    save_file(derived, target / WEIGHTS_FILE)
    (target / CONFIG_FILE).write_text(json.dumps(_derived_config(config, extra), indent=2) + "\n")
    return target


def _scale(config: Mapping[str, Any], tensor: str) -> float:
    """s of the projection that a tensor belongs to. The example adapters' patterns name projections."""
    projection = tensor.split(".")[-3]
    rank = config["rank_pattern"].get(projection, config["r"])
    alpha = config["alpha_pattern"].get(projection, config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config["use_rslora"] else rank))


def _derived_pair(a_rK: Matrix, b_Nr: Matrix, extra: int, rng: np.random.Generator) -> tuple[Matrix, Matrix]:
    """(A', B') of rank r + extra and scale 1."""
    v_Kr, over_a = np.linalg.qr(a_rK.T)
    u_Nr, over_b = np.linalg.qr(b_Nr)
    singular_r = np.linalg.svd(over_b @ over_a.T, compute_uv=False)
    p_rr, q_rr = (_orthogonal(len(singular_r), rng) for _ in range(2))
    root_r = np.sqrt(singular_r)  # half of it on either side: both stay in float16's range
    noise_a, noise_b = _normal((extra, a_rK.shape[1]), rng), _normal((b_Nr.shape[0], extra), rng)
    expected_norm = math.sqrt(noise_a.shape[1] * noise_b.shape[0] * extra)
    root_noise = math.sqrt(NOISE_SHARE * float(np.linalg.norm(singular_r)) / expected_norm)
    return (
        np.vstack([root_r[:, None] * (v_Kr @ q_rr).T, root_noise * noise_a]),
        np.hstack([(u_Nr @ p_rr) * root_r, root_noise * noise_b]),
    )


def _normal(shape: tuple[int, int], rng: np.random.Generator) -> Matrix:
    return rng.standard_normal(shape, dtype=np.float32)


def _orthogonal(size: int, rng: np.random.Generator) -> Matrix:
    return np.linalg.qr(_normal((size, size), rng)).Q


def _derived_config(config: Mapping[str, Any], extra: int) -> dict[str, Any]:
    """α = r everywhere: the scales are in B."""
    ranks = {name: rank + extra for name, rank in config["rank_pattern"].items()}
    rank = config["r"] + extra
    return {
        **config,
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": ranks,
        "alpha_pattern": dict(ranks),
    }

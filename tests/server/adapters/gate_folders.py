"""Gate sets for the tests: a valid one of the tiny base by default, and whatever is wrong with it when asked."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from perseid_router.gate_set import WEIGHTS_FILE, Column, Gate, GateSet, GateSetConfig
from perseid_server.model.spec import BaseSpec
from tests.fakes import tiny_spec

CONFIG = GateSetConfig((Column("a", "a" * 64), Column("b", "b" * 64)), base="someone/tiny")
TARGETS = ("q_proj", "v_proj", "down_proj")


def gate_set(
    config: GateSetConfig = CONFIG, *, base: BaseSpec | None = None, targets: tuple[str, ...] = TARGETS, seed: int = 0
) -> GateSet:
    """Random gates for every target of every layer."""
    base, random = base or tiny_spec(), np.random.default_rng(seed)
    gates = {
        (layer, target): Gate(
            random.normal(size=(config.num_columns, base.projections[target].in_features)).astype("f4"),
            random.normal(size=config.num_columns).astype("f4"),
        )
        for layer in range(base.num_layers)
        for target in targets
    }
    return GateSet(config, gates)


def write_gates(
    folder: Path, *, config: GateSetConfig = CONFIG, tensors: Mapping[str, np.ndarray] | None = None
) -> Path:
    """A valid set; `tensors` take the place of its tensors."""
    gate_set(config).write(folder)
    if tensors is not None:
        save_file(dict(tensors), folder / WEIGHTS_FILE)
    return folder

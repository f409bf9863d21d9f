"""A gate set: gates for an ordered list of adapters, and the folder it lives in.

    gate_set.json       what follows, as JSON (`GateSetConfig`; read and written by gate_set_config.py)
    gates.safetensors   layers.{layer}.{projection}.weight         [C, d_in]   a row for each column
                        layers.{layer}.{projection}.bias           [C]         optional, zero where missing
                        layers.{layer}.{fused}.input_mean_square   [d_in]      optional, see arrow.py
                        request_router.*                                       optional, see request_router.py

Columns are the adapters in the order of `adapters`, then the base (the null column) if `null` is true. A projection
without a weight is not gated: routed rows get the base there. How gates decide stands in
`perseid_kernels.routing`. Neither torch nor the server is imported here.

Shape legend: C columns, d_in inputs of a linear.
"""

import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from perseid_router.gate_set_config import (
    CONFIG_FILE,
    FORMAT,
    MAX_COLUMNS,
    SCHEMA,
    Column,
    GateSetConfig,
    GateSetError,
    Method,
    read_config,
    render_config,
)

__all__ = [
    "CONFIG_FILE", "FORMAT", "MAX_COLUMNS", "NEVER", "REQUEST_ROUTER_PREFIX", "SCHEMA", "WEIGHTS_FILE", "Column",
    "FileType", "Gate", "GateSet", "GateSetConfig", "GateSetError", "Method", "TensorKey",
]  # fmt: skip

WEIGHTS_FILE = "gates.safetensors"
REQUEST_ROUTER_PREFIX = "request_router."

NEVER: Final = -1e9
"""A bias that keeps a column from being chosen while any other may be: its weight in the softmax is exactly zero.

Finite, so that a column which alone is allowed still gets weight 1 and no NaN appears.
"""

_TENSOR_NAME = re.compile(
    r"layers\.(?P<layer>0|[1-9]\d{0,4})\.(?P<linear>\w+)\.(?P<part>weight|bias|input_mean_square)",
    re.ASCII,
)

Part = Literal["weight", "bias", "input_mean_square"]
FileType = Literal["float16", "float32"]


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """The gate of one projection: l = weight · x + bias."""

    weight: NDArray[np.float32]  # [C, d_in]
    bias: NDArray[np.float32]  # [C]


@dataclass(frozen=True, slots=True)
class TensorKey:
    """What a tensor of the weights file is: `linear` is a projection, for `input_mean_square` a fused linear."""

    layer: int
    linear: str
    part: Part

    @property
    def name(self) -> str:
        """The tensor's name in the file."""
        return f"layers.{self.layer}.{self.linear}.{self.part}"

    @staticmethod
    def parse(name: str) -> "TensorKey | None":
        """The key of a tensor of some layer; None for any other name."""
        match = _TENSOR_NAME.fullmatch(name)
        if match is None:
            return None
        part: Part = match["part"]  # type: ignore[assignment]  # one of the three that the expression allows
        return TensorKey(int(match["layer"]), match["linear"], part)


@dataclass(frozen=True, slots=True, eq=False)
class GateSet:
    """A gate set in memory, as whoever makes one holds it. The server reads files with more suspicion than `read`."""

    config: GateSetConfig
    gates: Mapping[tuple[int, str], Gate]  # by layer and projection
    input_mean_square: Mapping[tuple[int, str], NDArray[np.float32]] = field(default_factory=dict)  # layer, fused
    request_router: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)  # names without the prefix

    def write(self, folder: Path, dtype: FileType = "float32") -> None:
        """Write both files. A set that was there before is replaced; a kill on the way leaves no half of each.

        `dtype` is that of the gates' and the request router's matrices; what has one dimension stays float32.
        GateSetError where a value is not finite in it, or a gate has another number of rows than the set has columns.
        """
        config = render_config(self.config)
        tensors = self._tensors(np.dtype(dtype))
        folder.mkdir(parents=True, exist_ok=True)
        new_weights, new_config = (_beside(folder / name) for name in (WEIGHTS_FILE, CONFIG_FILE))
        try:
            save_file(tensors, new_weights)
            new_config.write_bytes(config)
            new_weights.chmod(new_config.stat().st_mode)  # safetensors lets only the owner read what it writes
            for path in (new_weights, new_config):
                _sync(path)
            (folder / CONFIG_FILE).unlink(missing_ok=True)  # no configuration, no gate set: never two that do not fit
            new_weights.replace(folder / WEIGHTS_FILE)
            new_config.replace(folder / CONFIG_FILE)
            _sync(folder)
        finally:
            for path in (new_weights, new_config):
                path.unlink(missing_ok=True)

    def _tensors(self, dtype: np.dtype[Any]) -> dict[str, NDArray[Any]]:
        if not self.gates:
            raise GateSetError("gates: a gate set needs at least one")
        tensors: dict[str, NDArray[Any]] = {}
        for (layer, projection), gate in sorted(self.gates.items()):
            weight, bias = (TensorKey(layer, projection, part) for part in ("weight", "bias"))
            if gate.weight.ndim != 2 or {len(gate.weight), *gate.bias.shape} != {self.config.num_columns}:
                raise GateSetError(
                    f"{weight.name}: the shapes are {list(gate.weight.shape)} and {list(gate.bias.shape)} (bias); "
                    f"expected a row for each of the {self.config.num_columns} columns"
                )
            tensors[weight.name] = gate.weight
            if gate.bias.any():
                tensors[bias.name] = gate.bias
        for (layer, fused), mean_square in sorted(self.input_mean_square.items()):
            tensors[TensorKey(layer, fused, "input_mean_square").name] = mean_square
        tensors |= {REQUEST_ROUTER_PREFIX + name: value for name, value in sorted(self.request_router.items())}
        return {
            name: _cast(name, value, dtype if value.ndim > 1 else np.dtype("f4")) for name, value in tensors.items()
        }

    @staticmethod
    def read(folder: Path) -> "GateSet":
        """Read what `write` wrote. GateSetError says what is wrong."""
        config = read_config(folder)
        try:
            tensors = load_file(folder / WEIGHTS_FILE)
        except (OSError, SafetensorError) as error:
            raise GateSetError(f"{WEIGHTS_FILE} cannot be read: {error}") from error
        found = {name: value.astype(np.float32, copy=False) for name, value in tensors.items()}
        gates: dict[tuple[int, str], Gate] = {}
        mean_squares: dict[tuple[int, str], NDArray[np.float32]] = {}
        router: dict[str, NDArray[np.float32]] = {}
        for name, value in found.items():
            key = TensorKey.parse(name)
            if key is not None and key.part == "weight":
                bias = found.get(TensorKey(key.layer, key.linear, "bias").name)
                gates[key.layer, key.linear] = Gate(value, np.zeros(len(value), np.float32) if bias is None else bias)
            elif key is not None and key.part == "input_mean_square":
                mean_squares[key.layer, key.linear] = value
            elif name.startswith(REQUEST_ROUTER_PREFIX):
                router[name.removeprefix(REQUEST_ROUTER_PREFIX)] = value
            elif key is None:
                raise GateSetError(f"unknown tensor {name!r} in {WEIGHTS_FILE}; expected layers.N.PROJECTION.weight")
        return GateSet(config, gates, mean_squares, router)


def _cast(name: str, values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(values, dtype)
    if not np.isfinite(cast).all():
        raise GateSetError(f"tensor {name!r}: a value is not finite in {dtype}; expected finite numbers (try float32)")
    return cast


def _beside(path: Path) -> Path:
    """A name in the same folder that nothing has yet."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

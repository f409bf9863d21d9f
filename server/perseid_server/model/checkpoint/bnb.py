"""bitsandbytes' 4-bit checkpoints, NF4 and FP4, with or without double quantisation.

    w = quant_map[q] · absmax[block];    absmax = nested_quant_map[c] · nested_absmax[block // 256] + nested_offset

Beside `weight` (two codes a byte, the first in the high nibble, row-major over the flattened matrix) lie the tensors
of its `QuantState`; `quant_state.bitsandbytes__nf4` holds JSON as bytes. Float32 throughout: bit-exact.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from perseid_kernels.weights import Int4Weight
from perseid_server.errors import UnsupportedModel
from perseid_server.model.checkpoint.layout import Shapes
from perseid_server.model.checkpoint.linear_format import LinearFormat
from perseid_server.model.checkpoint.nf4 import row_group, scale_per_row
from perseid_server.model.checkpoint.safetensors import TensorReader
from perseid_server.model.headers.safetensors import SafeTensor

_STATE = ".quant_state.bitsandbytes__"
_NESTED = (".nested_absmax", ".nested_quant_map")


@dataclass(frozen=True)
class Bnb4BitFormat(LinearFormat):
    """Reads matrices written by bitsandbytes' Linear4bit."""

    @staticmethod
    def of(quantization: Mapping[str, Any]) -> "Bnb4BitFormat":
        """From `quantization_config`; UnsupportedModel for LLM.int8()."""
        if not quantization.get("load_in_4bit"):
            raise UnsupportedModel(
                "quantization_config: bitsandbytes with load_in_8bit (LLM.int8) is not supported; save the model "
                "with load_in_4bit, or name the 16-bit checkpoint",
                field="quantization_config",
            )
        return Bnb4BitFormat()

    def fits(self, name: str, tensors: Mapping[str, SafeTensor]) -> bool:
        return _state_name(name, tensors) is not None

    def claims(self, name: str, shape: tuple[int, int], tensors: Mapping[str, SafeTensor]) -> Shapes:
        """Only the codes' size follows from the matrix's shape; the rest is checked when it is read."""
        expected_bytes = prod(shape) // 2
        if name in tensors and tensors[name].nbytes != expected_bytes:
            raise UnsupportedModel(
                f"tensor {name!r} has {tensors[name].nbytes} bytes of 4-bit codes; a matrix of {shape} needs "
                f"{expected_bytes}",
                field=name,
            )
        claimed: Shapes = {}
        state = _state_name(name, tensors)
        nested = [name + suffix for suffix in _NESTED if name + suffix in tensors]
        for part in (name, f"{name}.absmax", f"{name}.quant_map", state, *nested):
            if part is not None:
                claimed[part] = tensors[part].shape if part in tensors else ()
        return claimed

    def check(self, name: str, shape: tuple[int, int], reader: TensorReader) -> None:
        """The state must describe a matrix of this shape, with one maximum a block."""
        state = _read_state(name, reader)
        if tuple(state["shape"]) != shape:
            raise UnsupportedModel(
                f"tensor {name!r} stands for a matrix of {tuple(state['shape'])}; the config asks for {shape}",
                field=name,
            )
        found, expected = reader.tensors[f"{name}.absmax"].shape, -(-prod(shape) // int(state["blocksize"]))
        if found != (expected,):
            raise UnsupportedModel(f"tensor '{name}.absmax' has shape {found}; expected {(expected,)}", field=name)

    def read(self, name: str, shape: tuple[int, int], reader: TensorReader) -> Int4Weight:
        state = _read_state(name, reader)
        absmax = _absmax(name, state, reader)
        block = int(state["blocksize"])
        high_first = reader.read(name).reshape(-1).view(torch.uint8)
        return Int4Weight(
            ((high_first >> 4) | (high_first << 4)).view(shape[0], shape[1] // 2),
            reader.read(f"{name}.quant_map").to(torch.float32),
            scale_per_row(absmax, shape, block),
            None,
            row_group(shape[1], block),
        )


def _state_name(name: str, tensors: Mapping[str, SafeTensor]) -> str | None:
    return next((name + _STATE + kind for kind in ("nf4", "fp4") if name + _STATE + kind in tensors), None)


def _read_state(name: str, reader: TensorReader) -> dict[str, Any]:
    state_name = _state_name(name, reader.tensors)
    assert state_name is not None  # `fits` said so
    state: dict[str, Any] = json.loads(bytes(reader.read(state_name).tolist()))
    return state


def _absmax(name: str, state: Mapping[str, Any], reader: TensorReader) -> Tensor:
    """Maximum magnitude of each block, float32 [blocks]."""
    stored = reader.read(f"{name}.absmax")
    if f"{name}.nested_absmax" not in reader.tensors:
        return stored.to(torch.float32)
    levels = reader.read(f"{name}.nested_quant_map").to(torch.float32)
    nested = reader.read(f"{name}.nested_absmax").to(torch.float32)
    outer = nested.repeat_interleave(int(state["nested_blocksize"]))[: len(stored)]
    return levels[stored.long()] * outer + torch.tensor(state["nested_offset"], dtype=torch.float32)

"""GPTQ checkpoints in 4 bits: W[o, i] = scales[g, o] · (q[i, o] - z[g, o]).

qweight int32 [K/8, N] packs eight inputs, lowest bits first; qzeros int32 [G, N/8] packs eight outputs and, in
format v1, holds z - 1; scales float16 [G, N]; g_idx int32 [K] gives each input's group. Act-order checkpoints,
whose groups are scattered over the inputs, are refused: no group of neighbours shares a scale there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from perseid_kernels.weights import Int4Weight
from perseid_server.errors import UnsupportedModel
from perseid_server.model.checkpoint.affine import affine_weight, nibbles, num_groups
from perseid_server.model.checkpoint.layout import Shapes
from perseid_server.model.checkpoint.linear_format import LinearFormat
from perseid_server.model.checkpoint.safetensors import TensorReader
from perseid_server.model.config_fields import integer
from perseid_server.model.headers.safetensors import SafeTensor


@dataclass(frozen=True)
class GptqFormat(LinearFormat):
    """Reads matrices written by AutoGPTQ, GPTQModel or optimum."""

    group_size: int  # -1: one group a row
    zeros_are_less_one: bool

    @staticmethod
    def of(quantization: Mapping[str, Any]) -> "GptqFormat":
        """From `quantization_config`."""
        bits, layout = quantization.get("bits"), quantization.get("checkpoint_format", "gptq")
        if bits != 4:
            raise UnsupportedModel(f"quantization_config: gptq with {bits} bits is not supported; expected 4")
        if layout not in {"gptq", "gptq_v2"}:
            raise UnsupportedModel(
                f"quantization_config: gptq's checkpoint_format {layout!r} is not supported; expected 'gptq' or "
                "'gptq_v2'"
            )
        return GptqFormat(integer(quantization, "group_size", 128, "quantization_config"), layout == "gptq")

    def fits(self, name: str, tensors: Mapping[str, SafeTensor]) -> bool:
        return _part(name, "qweight") in tensors

    def claims(self, name: str, shape: tuple[int, int], tensors: Mapping[str, SafeTensor]) -> Shapes:
        num_outputs, num_inputs = shape
        groups = num_groups(num_inputs, self.group_size)
        claimed: Shapes = {
            _part(name, "qweight"): (num_inputs // 8, num_outputs),
            _part(name, "qzeros"): (groups, num_outputs // 8),
            _part(name, "scales"): (groups, num_outputs),
        }
        if _part(name, "g_idx") in tensors:
            claimed[_part(name, "g_idx")] = (num_inputs,)
        return claimed

    def read(self, name: str, shape: tuple[int, int], reader: TensorReader) -> Int4Weight:  # noqa: ARG002
        # Eight inputs of one output are the four bytes of an int32: transposed, they lie as Int4Weight has them.
        codes = reader.read(_part(name, "qweight")).t().contiguous().view(torch.uint8)
        zeros = nibbles(reader.read(_part(name, "qzeros")))
        if self.zeros_are_less_one:
            zeros = (zeros + 1) & 0xF  # a zero point of 0 is stored as 15
        return affine_weight(codes, reader.read(_part(name, "scales")), zeros, self.group_size)

    def check(self, name: str, shape: tuple[int, int], reader: TensorReader) -> None:
        """Refuse act-order: `g_idx` must name groups of neighbours."""
        num_inputs, index_name = shape[1], _part(name, "g_idx")
        if index_name not in reader.tensors:
            return
        group = num_inputs if self.group_size <= 0 else self.group_size
        if not torch.equal(reader.read(index_name).long(), torch.arange(num_inputs) // group):
            raise UnsupportedModel(
                f"tensor {index_name!r}: groups are not runs of neighbouring inputs (GPTQ with desc_act); name a "
                "checkpoint quantised with desc_act=false",
                field=index_name,
            )


def _part(name: str, part: str) -> str:
    return name.removesuffix("weight") + part

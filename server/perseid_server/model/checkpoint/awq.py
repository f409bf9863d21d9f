"""AWQ checkpoints in 4 bits, "gemm" layout: W[o, i] = scales[g, o] · (q[i, o] - z[g, o]).

qweight int32 [K, N/8] and qzeros int32 [G, N/8] pack eight outputs; the nibble at bit 4k of column c is output
8c + ORDER[k]. scales float16 [G, N].
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from perseid_kernels.weights import Int4Weight
from perseid_server.errors import UnsupportedModel
from perseid_server.model.checkpoint.affine import affine_weight, nibbles, num_groups
from perseid_server.model.checkpoint.layout import Shapes
from perseid_server.model.checkpoint.linear_format import LinearFormat
from perseid_server.model.checkpoint.safetensors import TensorReader
from perseid_server.model.config_fields import integer
from perseid_server.model.headers.safetensors import SafeTensor

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class AwqFormat(LinearFormat):
    """Reads matrices written by AutoAWQ."""

    group_size: int  # -1: one group a row

    @staticmethod
    def of(quantization: Mapping[str, Any]) -> "AwqFormat":
        """From `quantization_config`."""
        bits = quantization.get("bits", quantization.get("w_bit"))
        version = str(quantization.get("version", "gemm")).lower()
        if bits != 4 or version != "gemm" or not quantization.get("zero_point", True):
            raise UnsupportedModel(
                f"quantization_config: awq with bits={bits}, version={version!r}, "
                f"zero_point={quantization.get('zero_point', True)} is not supported; expected 4, 'gemm', true"
            )
        return AwqFormat(integer(quantization, "group_size", integer(quantization, "q_group_size", 128)))

    def fits(self, name: str, tensors: Mapping[str, SafeTensor]) -> bool:
        return _part(name, "qweight") in tensors

    def claims(self, name: str, shape: tuple[int, int], tensors: Mapping[str, SafeTensor]) -> Shapes:  # noqa: ARG002
        num_outputs, num_inputs = shape
        groups = num_groups(num_inputs, self.group_size)
        return {
            _part(name, "qweight"): (num_inputs, num_outputs // 8),
            _part(name, "qzeros"): (groups, num_outputs // 8),
            _part(name, "scales"): (groups, num_outputs),
        }

    def read(self, name: str, shape: tuple[int, int], reader: TensorReader) -> Int4Weight:  # noqa: ARG002
        codes_NK = nibbles(reader.read(_part(name, "qweight")), ORDER).t()
        packed = (codes_NK[:, 0::2] | (codes_NK[:, 1::2] << 4)).contiguous()
        zeros = nibbles(reader.read(_part(name, "qzeros")), ORDER)
        return affine_weight(packed, reader.read(_part(name, "scales")), zeros, self.group_size)


def _part(name: str, part: str) -> str:
    return name.removesuffix("weight") + part

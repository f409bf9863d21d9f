"""How a matrix may lie in a Hugging Face folder: in 16 bit, kept or to be quantised, or quantised by a known tool."""

from collections.abc import Mapping
from typing import Any

import torch

from perseid_kernels.weights import DenseWeight, Weight
from perseid_server.errors import UnsupportedModel
from perseid_server.model.checkpoint.awq import AwqFormat
from perseid_server.model.checkpoint.bnb import Bnb4BitFormat
from perseid_server.model.checkpoint.gptq import GptqFormat
from perseid_server.model.checkpoint.layout import Shapes
from perseid_server.model.checkpoint.linear_format import LinearFormat
from perseid_server.model.checkpoint.nf4 import quantize_nf4
from perseid_server.model.checkpoint.safetensors import TensorReader
from perseid_server.model.headers.safetensors import SafeTensor

DENSE_TYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class DenseFormat(LinearFormat):
    """A 16- or 32-bit matrix, kept as it is."""

    def fits(self, name: str, tensors: Mapping[str, SafeTensor]) -> bool:
        return name in tensors and tensors[name].dtype in DENSE_TYPES

    def claims(self, name: str, shape: tuple[int, int], tensors: Mapping[str, SafeTensor]) -> Shapes:  # noqa: ARG002
        return {name: shape}

    def read(self, name: str, shape: tuple[int, int], reader: TensorReader) -> Weight:  # noqa: ARG002
        return DenseWeight(reader.read(name))


class QuantizeFormat(DenseFormat):
    """A 16- or 32-bit matrix, quantised to NF4 while it is read."""

    def read(self, name: str, shape: tuple[int, int], reader: TensorReader) -> Weight:  # noqa: ARG002
        try:
            return quantize_nf4(reader.read(name))
        except UnsupportedModel as error:
            raise UnsupportedModel(f"tensor {name!r}: {error.message}", field=name) from error


def linear_formats(quantization: Mapping[str, Any] | None) -> tuple[LinearFormat, ...]:
    """The formats a linear may have under the config's `quantization_config`, the most special first.

    A quantised checkpoint keeps the modules it skipped in 16 bit, and so do we. UnsupportedModel names a method or
    a setting that is not read.
    """
    if quantization is None:
        return (QuantizeFormat(),)
    match quantization.get("quant_method"):
        case "bitsandbytes":
            return Bnb4BitFormat.of(quantization), DenseFormat()
        case "gptq":
            return GptqFormat.of(quantization), DenseFormat()
        case "awq":
            return AwqFormat.of(quantization), DenseFormat()
        case method:
            raise UnsupportedModel(
                f"quantization_config: method {method!r} is not supported; supported: bitsandbytes (4 bit), gptq, "
                "awq, or a 16-bit checkpoint",
                field="quantization_config",
            )

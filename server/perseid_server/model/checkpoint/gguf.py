"""A base in one GGUF file, read tensor by tensor from the mapped file."""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from perseid_kernels.weights import Weight
from perseid_server.errors import UnsupportedModel
from perseid_server.model.checkpoint.base import NormName
from perseid_server.model.checkpoint.ggml import DECODERS
from perseid_server.model.checkpoint.layout import (
    GgufNames,
    Shapes,
    bias_of,
    check_tensors,
    linear_shapes,
    table_shapes,
    vector_shapes,
)
from perseid_server.model.config import DecoderConfig, base_spec
from perseid_server.model.content_hash import file_sha256
from perseid_server.model.gguf_config import ROPE_FACTORS, from_gguf
from perseid_server.model.headers.gguf import GgufHeader, GgufTensor, read_gguf_header
from perseid_server.model.spec import BaseSpec

_DENSE = ("F32", "F16", "BF16")


class GgufCheckpoint:
    """`Checkpoint` over a GGUF file. UnsupportedModel at construction names what cannot be served."""

    def __init__(self, path: Path, name: str) -> None:
        self._header = read_gguf_header(path)
        self._data = np.memmap(path, dtype=np.uint8, mode="r")
        self._name = name
        self.config = from_gguf(self._header, self._frequency_factors())
        check_gguf_tensors(self._header, self.config)

    @cached_property
    def spec(self) -> BaseSpec:
        """The hash is the file's SHA-256."""
        return base_spec(self._name, file_sha256(self._header.path), self.config)

    def linear(self, layer: int, projection: str) -> Weight:
        """Rows of q and k come back in Hugging Face's order."""
        weight = GgufNames.linear(layer, projection)
        rows = self._rows(weight)
        order = self._row_order(projection)
        return self._decode(weight, rows if order is None else rows[order])

    def bias(self, layer: int, projection: str) -> Tensor | None:
        if not self.config.has_bias(projection):
            return None
        values = self._vector(bias_of(GgufNames.linear(layer, projection)))
        order = self._row_order(projection)
        return values if order is None else values[torch.from_numpy(order)]

    def norm(self, layer: int, name: NormName) -> Tensor:
        return self._vector(GgufNames.norm(layer, name))

    def qk_norm(self, layer: int, which: Literal["q", "k"]) -> Tensor:
        return self._vector(GgufNames.qk_norm(layer, which))

    def embedding(self) -> Weight:
        return self._decode(GgufNames.embedding, self._rows(GgufNames.embedding))

    def final_norm(self) -> Tensor:
        return self._vector(GgufNames.final_norm)

    def lm_head(self) -> Weight | None:
        if self.config.tie_word_embeddings:
            return None
        return self._decode(GgufNames.lm_head, self._rows(GgufNames.lm_head))

    def _row_order(self, projection: str) -> NDArray[np.int64] | None:
        """Which file row each Hugging Face row is, None where they agree.

        For "llama", llama.cpp stores a head's rows so that the two of a rotated pair are neighbours (2j, 2j+1);
        Hugging Face rotates j with j + D/2. Qwen files keep Hugging Face's order.
        """
        if projection not in {"q_proj", "k_proj"} or self._header.architecture not in {"llama", "mistral"}:
            return None
        num_rows = self.config.shape(projection).out_features
        pairs = np.arange(num_rows).reshape(-1, self.config.head_dim // 2, 2)
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(-1)

    def _frequency_factors(self) -> tuple[float, ...]:
        if ROPE_FACTORS not in self._header.tensors:
            return ()
        _check_type(self._header.tensors[ROPE_FACTORS], _DENSE)
        return tuple(self._vector(ROPE_FACTORS).tolist())

    def _rows(self, name: str) -> NDArray[np.uint8]:
        """A copy of the tensor's bytes, uint8 [rows, bytes a row]: the mapping must not be what keeps memory."""
        tensor = self._header.tensors[name]
        raw = self._data[tensor.offset : tensor.offset + tensor.nbytes]
        rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
        return np.array(raw).reshape(rows, -1)

    def _decode(self, name: str, rows: NDArray[np.uint8]) -> Weight:
        return DECODERS[self._header.tensors[name].type.name](rows)

    def _vector(self, name: str) -> Tensor:
        weight = self._decode(name, self._rows(name))
        return weight.dequantize().reshape(-1)


def check_gguf_tensors(header: GgufHeader, config: DecoderConfig) -> None:
    """Names, shapes and types of all tensors. UnsupportedModel names the first that does not fit."""
    matrices = linear_shapes(config, GgufNames) | table_shapes(config, GgufNames)
    expected: Shapes = {**matrices, **vector_shapes(config, GgufNames)}
    if config.rope.frequency_factors:
        expected[ROPE_FACTORS] = (config.head_dim // 2,)
    check_tensors({name: tensor.shape for name, tensor in header.tensors.items()}, expected)
    for name in expected:
        _check_type(header.tensors[name], DECODERS.keys() if name in matrices else _DENSE)


def _check_type(tensor: GgufTensor, allowed: Iterable[str]) -> None:
    names = tuple(allowed)
    if tensor.type.name not in names:
        raise UnsupportedModel(
            f"tensor {tensor.name!r} has type {tensor.type.name}; supported here: {', '.join(names)}",
            field=tensor.name,
        )

"""A base in a Hugging Face folder of safetensors: 16-bit, or quantised by bitsandbytes, GPTQ or AWQ.

Linears of a 16-bit checkpoint are quantised to NF4 one by one as they are read; embedding and head keep their type,
as bitsandbytes keeps them.
"""

import re
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from perseid_kernels.weights import DenseWeight, Weight
from perseid_server.errors import UnsupportedModel
from perseid_server.model.checkpoint.base import NormName
from perseid_server.model.checkpoint.formats import DENSE_TYPES, linear_formats
from perseid_server.model.checkpoint.layout import (
    HfNames,
    Shapes,
    bias_of,
    check_tensors,
    linear_shapes,
    table_shapes,
    vector_shapes,
)
from perseid_server.model.checkpoint.linear_format import LinearFormat
from perseid_server.model.checkpoint.safetensors import TensorReader
from perseid_server.model.config import DecoderConfig, base_spec, from_hf
from perseid_server.model.config_fields import token_ids
from perseid_server.model.content_hash import files_sha256
from perseid_server.model.headers.safetensors import HfFolder, SafeTensor, read_hf_folder, read_json
from perseid_server.model.spec import BaseSpec

_BUFFERS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Derived from the config; old versions of transformers saved them."""


class HfCheckpoint:
    """`Checkpoint` over a folder. UnsupportedModel at construction names what cannot be served."""

    def __init__(self, path: Path, name: str) -> None:
        self._folder = read_hf_folder(path)
        self._name = name
        self.config = hf_config(self._folder)
        self._formats = check_hf_tensors(self._folder, self.config)
        self._shapes = linear_shapes(self.config, HfNames)
        self._reader = TensorReader(self._folder)
        for linear, shape in self._shapes.items():
            self._formats[linear].check(linear, shape, self._reader)

    @cached_property
    def spec(self) -> BaseSpec:
        """The hash covers the config, all data files, and that linears were quantised here if they were."""
        files = (self._folder.path / "config.json", *self._folder.files)
        salt = "nf4" if self._folder.quantization is None else ""
        return base_spec(self._name, files_sha256(((file.name, file) for file in files), salt), self.config)

    def linear(self, layer: int, projection: str) -> Weight:
        name = HfNames.linear(layer, projection)
        return self._formats[name].read(name, self._shapes[name], self._reader)

    def bias(self, layer: int, projection: str) -> Tensor | None:
        if not self.config.has_bias(projection):
            return None
        return self._vector(bias_of(HfNames.linear(layer, projection)))

    def norm(self, layer: int, name: NormName) -> Tensor:
        return self._vector(HfNames.norm(layer, name))

    def qk_norm(self, layer: int, which: Literal["q", "k"]) -> Tensor:
        return self._vector(HfNames.qk_norm(layer, which))

    def embedding(self) -> Weight:
        return DenseWeight(self._reader.read(HfNames.embedding))

    def final_norm(self) -> Tensor:
        return self._vector(HfNames.final_norm)

    def lm_head(self) -> Weight | None:
        if self.config.tie_word_embeddings:
            self._check_tied_head()
            return None
        return DenseWeight(self._reader.read(HfNames.lm_head))

    def _vector(self, name: str) -> Tensor:
        return self._reader.read(name).to(torch.float32)

    def _check_tied_head(self) -> None:
        """A head saved although it is tied must be the embedding, or one of the two would go unused."""
        if HfNames.lm_head in self._reader.tensors and not torch.equal(
            self._reader.read(HfNames.lm_head), self._reader.read(HfNames.embedding)
        ):
            raise UnsupportedModel(
                f"tensor {HfNames.lm_head!r} differs from the embedding although tie_word_embeddings is true; set "
                "tie_word_embeddings to false in config.json if the head is meant",
                field=HfNames.lm_head,
            )


def hf_config(folder: HfFolder) -> DecoderConfig:
    """The decoder of a folder: `config.json`, and the end tokens of `generation_config.json`, which win."""
    generation = folder.path / "generation_config.json"
    stated = dict(folder.config)
    if generation.is_file():
        ends = token_ids(read_json(generation), "eos_token_id") + token_ids(stated, "eos_token_id")
        stated["eos_token_id"] = list(dict.fromkeys(ends))
    return from_hf(stated)


def check_hf_tensors(folder: HfFolder, config: DecoderConfig) -> dict[str, LinearFormat]:
    """The format of every linear. UnsupportedModel names the first tensor that does not fit."""
    tensors = folder.tensors
    candidates = linear_formats(folder.quantization)
    unquantized: Shapes = {**vector_shapes(config, HfNames), **table_shapes(config, HfNames)}
    expected = dict(unquantized)
    formats: dict[str, LinearFormat] = {}
    for name, shape in linear_shapes(config, HfNames).items():
        formats[name] = _format_of(name, folder, candidates)
        expected |= formats[name].claims(name, shape, tensors)
    ignored = {name for name in tensors if _BUFFERS.fullmatch(name)}
    if config.tie_word_embeddings:
        ignored.add(HfNames.lm_head)
    check_tensors({name: tensor.shape for name, tensor in tensors.items()}, expected, ignored)
    for name in unquantized:
        _check_type(tensors[name])
    return formats


def _format_of(name: str, folder: HfFolder, candidates: tuple[LinearFormat, ...]) -> LinearFormat:
    for candidate in candidates:
        if candidate.fits(name, folder.tensors):
            return candidate
    if name in folder.tensors:
        _check_type(folder.tensors[name])
    raise UnsupportedModel(f"tensor {name!r} is missing", field=name)


def _check_type(tensor: SafeTensor) -> None:
    if tensor.dtype not in DENSE_TYPES:
        raise UnsupportedModel(
            f"tensor {tensor.name!r} has type {tensor.dtype}; expected one of {', '.join(DENSE_TYPES)}",
            field=tensor.name,
        )

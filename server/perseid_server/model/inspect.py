"""What a base holds and whether it would be served: headers only, no tensor is read."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from perseid_server.errors import UnsupportedModel
from perseid_server.model.config import DecoderConfig
from perseid_server.model.headers.gguf import read_gguf_header
from perseid_server.model.headers.safetensors import read_hf_folder
from perseid_server.model.source import ModelSource, resolve_model
from perseid_server.model.tokenizer import export_tokenizer


@dataclass(frozen=True, slots=True)
class TensorTypeCount:
    """How much of a checkpoint is stored in one element type."""

    type: str  # GGML's name ("Q4_1") or safetensors' ("BF16")
    num_tensors: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class ModelReport:
    """One base. Fields after `reason` are None where the header could not be understood that far."""

    name: str
    path: Path
    kind: str  # "gguf" or "hf"
    architecture: str  # as the file states it
    quantization: str  # how the linears are stored
    tensor_types: tuple[TensorTypeCount, ...]  # the largest first
    num_bytes: int  # of tensor data
    accepted: bool
    reason: str | None  # why not accepted
    num_parameters: int | None = None
    num_layers: int | None = None
    hidden_size: int | None = None
    vocab_size: int | None = None
    context_length: int | None = None  # tokens
    sliding_window: int | None = None  # tokens
    rope_scaling: str | None = None
    tied_embeddings: bool | None = None
    has_chat_template: bool | None = None


def inspect_model(source: str | ModelSource) -> ModelReport:
    """Report on a source as `resolve_model` takes it. Raises only where there is nothing to report on: no such
    source, or a file that is not a model at all."""
    found = source if isinstance(source, ModelSource) else resolve_model(source)
    architecture, quantization, types = _headers(found)
    config, reason = _try_to_open(found)
    has_template, tokenizer_reason = _try_tokenizer(found)
    reason = reason or tokenizer_reason
    return ModelReport(
        name=found.name,
        path=found.path,
        kind=found.kind,
        architecture=architecture,
        quantization=quantization,
        tensor_types=types,
        num_bytes=sum(one.num_bytes for one in types),
        accepted=reason is None,
        reason=reason,
        has_chat_template=has_template,
        **_of_config(config),
    )


def _headers(source: ModelSource) -> tuple[str, str, tuple[TensorTypeCount, ...]]:
    """Architecture, quantisation and element types, from files that may well be unsupported."""
    if source.kind == "gguf":
        header = read_gguf_header(source.path)
        types = _count((tensor.type.name, tensor.nbytes) for tensor in header.tensors.values())
        return header.architecture, types[0].type if types else "none", types
    folder = read_hf_folder(source.path)
    stated = folder.config.get("architectures") or folder.config.get("model_type", "unnamed")
    architecture = str(stated[0] if isinstance(stated, list) else stated)
    types = _count((tensor.dtype, tensor.nbytes) for tensor in folder.tensors.values())
    if folder.quantization is None:
        return architecture, "none; linears become NF4 while loading", types
    return architecture, str(folder.quantization.get("quant_method")), types


def _count(tensors: Iterable[tuple[str, int]]) -> tuple[TensorTypeCount, ...]:
    found: dict[str, list[int]] = {}
    for kind, num_bytes in tensors:
        found.setdefault(kind, []).append(num_bytes)
    counts = (TensorTypeCount(kind, len(sizes), sum(sizes)) for kind, sizes in found.items())
    return tuple(sorted(counts, key=lambda one: -one.num_bytes))


def _try_to_open(source: ModelSource) -> tuple[DecoderConfig | None, str | None]:
    from perseid_server.model.checkpoint import open_checkpoint  # noqa: PLC0415  imports torch, this module does not

    try:
        return open_checkpoint(source).config, None
    except UnsupportedModel as error:
        return None, error.message


def _try_tokenizer(source: ModelSource) -> tuple[bool | None, str | None]:
    try:
        return export_tokenizer(source).chat_template is not None, None
    except UnsupportedModel as error:
        return None, error.message


def _of_config(config: DecoderConfig | None) -> dict[str, Any]:
    if config is None:
        return {}
    return {
        "num_parameters": _num_parameters(config),
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "sliding_window": config.sliding_window,
        "rope_scaling": config.rope.type,
        "tied_embeddings": config.tie_word_embeddings,
    }


def _num_parameters(config: DecoderConfig) -> int:
    """Weights of the unpacked model; a tied head counts once."""
    from perseid_server.model.checkpoint.layout import (  # noqa: PLC0415  its package imports torch
        HfNames,
        linear_shapes,
        table_shapes,
        vector_shapes,
    )

    matrices = linear_shapes(config, HfNames) | table_shapes(config, HfNames)
    return sum(prod(shape) for shape in (*matrices.values(), *vector_shapes(config, HfNames).values()))

"""Tiny models on disk for the loading tests, written by transformers, safetensors and gguf themselves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
"""Small, but whole 256-blocks in every row, so that every GGML type fits."""


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """A config of one of the four families."""
    settings = SHAPE | changes
    match family:
        case "llama":
            return LlamaConfig(**settings)
        case "mistral":
            return MistralConfig(**{"sliding_window": None} | settings)
        case "qwen2":
            return Qwen2Config(**settings)
        case "qwen3":
            return Qwen3Config(**{"head_dim": 128} | settings)
    raise ValueError(family)


def tiny_model(config: PretrainedConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of the config's model, by Hugging Face name; biases and norms are random too."""
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in model.state_dict().items():
        spread = torch.randn(value.shape, generator=generator) * 0.05
        weights[name] = 1 + spread if "norm" in name else spread
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights


def write_hf(folder: Path, config: PretrainedConfig, weights: Mapping[str, Tensor]) -> Path:
    """A folder as save_pretrained writes it, in one file."""
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = [_architecture(config)]
    config.save_pretrained(folder)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    return folder


def _architecture(config: PretrainedConfig) -> str:
    return {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[
        config.model_type
    ] + "ForCausalLM"


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name for a Hugging Face name."""
    for theirs, ours in GGUF_NAMES.items():
        name = name.replace(theirs, ours)
    return name.replace("model.layers.", "blk.")


def rotate_like_llama_cpp(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """convert_hf_to_gguf.py's order of q and k rows: the two halves of a head are interleaved."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def quantized(values: np.ndarray, kind: str, rng: np.random.Generator) -> tuple[np.ndarray, Any]:
    """Bytes of a matrix in a GGML type. gguf cannot quantise to Q4_K and Q6_K: those get random blocks with sane
    scales, which tests the reading as well."""
    qtype = gguf.GGMLQuantizationType[kind]
    if kind not in {"Q4_K", "Q6_K"}:
        return gguf.quantize(values, qtype), qtype
    block, nbytes = gguf.GGML_QUANT_SIZES[qtype]
    blocks = rng.integers(0, 256, (*values.shape[:-1], values.shape[-1] // block, nbytes), dtype=np.uint8)
    places = {"Q4_K": (0, 2), "Q6_K": (208,)}[kind]
    for place in places:
        scale = rng.uniform(1e-4, 1e-3, blocks.shape[:-1]).astype(np.float16)
        blocks[..., place : place + 2] = scale[..., None].view(np.uint8)
    return blocks.reshape(*values.shape[:-1], -1), qtype


def write_gguf(
    path: Path,
    config: PretrainedConfig,
    weights: Mapping[str, Tensor],
    linears: str = "Q4_1",
    tables: str = "Q8_0",
    extra: Mapping[str, np.ndarray] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """The model as llama.cpp's converter and quantiser would write it."""
    arch = "llama" if config.model_type == "mistral" else config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if config.model_type == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    for key, value in (metadata or {}).items():
        add = {bool: writer.add_bool, str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
        add[type(value)](f"{arch}.{key}", value)
    rng = np.random.default_rng(0)
    for name, value in weights.items():
        values = value.float().numpy()
        for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if arch == "llama" and projection in name:
                values = rotate_like_llama_cpp(values, heads)
        if values.ndim == 1:
            writer.add_tensor(gguf_name(name), values)
        else:
            kind = tables if "embed" in name or "lm_head" in name else linears
            data, qtype = quantized(np.ascontiguousarray(values), kind, rng)
            writer.add_tensor(gguf_name(name), data, raw_dtype=qtype)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

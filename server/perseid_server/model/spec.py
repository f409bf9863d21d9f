"""What the rest of the server must know of a base model. Standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinearShape:
    """y = x Wᵀ with W of shape [out_features, in_features]."""

    in_features: int
    out_features: int


FUSED_LINEARS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""Projections that share an input are one fused linear (one product, one shrink); outputs lie side by side."""

PARENT_OF_PROJECTION: Mapping[str, str] = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
"""Where Hugging Face keeps a projection: `model.layers.{i}.{parent}.{projection}`."""


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """The shape of a base model, as adapters and KV caches see it. All layers are alike."""

    name: str  # as served, e.g. "SmolLM2-135M-Instruct"
    hash: str  # SHA-256 of the files it came from; part of every KV key
    architecture: str  # e.g. "LlamaForCausalLM"
    num_layers: int
    hidden_size: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    projections: Mapping[str, LinearShape]  # "q_proj" → shape; keys are those of PARENT_OF_PROJECTION
    eos_token_ids: tuple[int, ...] = ()

    def fused_shape(self, fused: str) -> LinearShape:
        """Shape of a fused linear: the shared input, the outputs of its parts side by side."""
        parts = [self.projections[name] for name in FUSED_LINEARS[fused]]
        return LinearShape(parts[0].in_features, sum(part.out_features for part in parts))

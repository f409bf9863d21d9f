"""The shape of a decoder, read from GGUF metadata. Imports no torch.

llama.cpp files Mistral and SmolLM2 under "llama". Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from collections.abc import Mapping
from typing import Any

from perseid_server.errors import UnsupportedModel, quoted
from perseid_server.model.config import FAMILIES, DecoderConfig, checked, unsupported_architecture
from perseid_server.model.config_fields import number, token_ids
from perseid_server.model.headers.gguf import GgufHeader
from perseid_server.model.rope_scaling import RopeScaling

ARCHITECTURES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""llama.cpp's name → Hugging Face's."""

ROPE_FACTORS = "rope_freqs.weight"
"""A tensor of divisors, one a frequency: how llama.cpp stores Llama 3's scaling."""

_END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")
_DEFAULT_ROPE_THETA = 10000.0

# Keys of relatives (Granite, MiniCPM, Mixtral …) that llama.cpp also files under these names.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "attention.scale": (0,),
    "attention.clamp_kqv": (0,),
    "attention.causal": (True,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "use_parallel_residual": (False,),
    "tensor_data_layout": ("Meta AI original pth", "reference"),
}
"""Values under which a key changes nothing; any other is refused."""


def from_gguf(header: GgufHeader, frequency_factors: tuple[float, ...] = ()) -> DecoderConfig:
    """The decoder of a GGUF file. UnsupportedModel names the key that rules it out.

    `frequency_factors` is the content of the tensor ROPE_FACTORS where the file has one.
    """
    if header.architecture not in ARCHITECTURES:
        raise unsupported_architecture(header.architecture)
    architecture = ARCHITECTURES[header.architecture]
    _refuse_relatives(header)
    hidden_size, num_heads = _size(header, "embedding_length"), _size(header, "attention.head_count")
    head_dim = _head_dim(header, hidden_size // num_heads)
    context, window = _size(header, "context_length"), header.get("attention.sliding_window")
    return checked(
        DecoderConfig(
            architecture=architecture,
            num_layers=_size(header, "block_count"),
            hidden_size=hidden_size,
            intermediate_size=_size(header, "feed_forward_length"),
            num_heads=num_heads,
            num_kv_heads=_size(header, "attention.head_count_kv", num_heads),
            head_dim=head_dim,
            vocab_size=_vocab_size(header),
            max_position_embeddings=min(context, window or context),
            rms_norm_eps=_number(header, "attention.layer_norm_rms_epsilon", 1e-6),
            rope=_rope(header, context, frequency_factors),
            tie_word_embeddings="output.weight" not in header.tensors,
            qkv_bias="blk.0.attn_q.bias" in header.tensors,
            o_bias="blk.0.attn_output.bias" in header.tensors,
            mlp_bias="blk.0.ffn_gate.bias" in header.tensors,
            qk_norm=FAMILIES[architecture].qk_norm,
            sliding_window=window or None,
            bos_token_id=next(iter(token_ids(header.metadata, "tokenizer.ggml.bos_token_id")), None),
            eos_token_ids=end_token_ids(header),
            dtype="float32",
        )
    )


def end_token_ids(header: GgufHeader) -> tuple[int, ...]:
    """End of text, of turn and of message, without repeats."""
    stated = (token_ids(header.metadata, f"tokenizer.ggml.{key}") for key in _END_TOKENS)
    return tuple(dict.fromkeys(token for tokens in stated for token in tokens))


def _refuse_relatives(header: GgufHeader) -> None:
    for key, neutral in _NEUTRAL.items():
        value = header.get(key)
        if value is not None and value not in neutral:
            name = f"{header.architecture}.{key}"
            raise UnsupportedModel(
                f"{name} = {value!r} is not supported; it changes the model's mathematics", field=name
            )


def _head_dim(header: GgufHeader, default: int) -> int:
    key_length = _size(header, "attention.key_length", _size(header, "rope.dimension_count", default))
    for key in ("attention.value_length", "rope.dimension_count"):
        if _size(header, key, key_length) != key_length:
            raise UnsupportedModel(
                f"{header.architecture}.{key}: expected the head dimension {key_length}, got {header.get(key)}",
                field=key,
            )
    return key_length


def _vocab_size(header: GgufHeader) -> int:
    """Rows of the embedding: some files state fewer or no tokens in their metadata."""
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise UnsupportedModel("tensor 'token_embd.weight' is missing")
    if len(embedding.shape) != 2:
        raise UnsupportedModel(f"tensor 'token_embd.weight' has the shape {list(embedding.shape)}; expected a matrix")
    return embedding.shape[0]


def _rope(header: GgufHeader, context: int, frequency_factors: tuple[float, ...]) -> RopeScaling:
    theta = _number(header, "rope.freq_base", _DEFAULT_ROPE_THETA)
    kind = header.get("rope.scaling.type", "none")
    if frequency_factors:
        if kind not in {"none", "linear"} or header.get("rope.scaling.factor", 1.0) != 1.0:
            raise UnsupportedModel(f"rope.scaling.type {kind!r} together with {ROPE_FACTORS} is not supported")
        return RopeScaling(theta, "factors", frequency_factors=frequency_factors)
    factor = _number(header, "rope.scaling.factor", _number(header, "rope.scale_linear", 1.0))
    match kind:
        case "none" | "linear":
            return RopeScaling(theta) if factor in {0.0, 1.0} else RopeScaling(theta, "linear", factor)
        case "yarn":
            return _yarn(header, theta, factor, context)
        case _:
            raise UnsupportedModel(
                f"rope.scaling.type: {kind!r} is not supported; supported: none, linear, yarn",
                field="rope.scaling.type",
            )


def _yarn(header: GgufHeader, theta: float, factor: float, context: int) -> RopeScaling:
    if header.get("rope.scaling.yarn_log_multiplier"):
        raise UnsupportedModel("rope.scaling.yarn_log_multiplier is not supported", field="rope.scaling")
    plain = RopeScaling.yarn_temperature(factor)
    return RopeScaling(
        theta,
        "yarn",
        factor,
        _size(header, "rope.scaling.original_context_length", context),
        beta_fast=_number(header, "rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=_number(header, "rope.scaling.yarn_beta_slow", 1.0),
        attention_scaling=plain * _number(header, "rope.scaling.yarn_attn_factor", 1.0),
    )


def _number(header: GgufHeader, key: str, default: float) -> float:
    return number(header.metadata, f"{header.architecture}.{key}", default)


def _size(header: GgufHeader, key: str, default: int | None = None) -> int:
    value = header.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        name = f"{header.architecture}.{key}"
        raise UnsupportedModel(f"{name}: expected one positive integer, got {quoted(header.get(key))}", field=name)
    return value

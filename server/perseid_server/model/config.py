"""The shape of a decoder, read from a Hugging Face config or from GGUF metadata. Imports no torch.

Four families share one decoder: RMS norm, rotary position embedding on half-split heads, grouped-query
attention, SiLU-gated feed-forward. They differ in biases, in norms on q and k, and in defaults.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from perseid_server.errors import UnsupportedModel
from perseid_server.model.config_fields import flag, integer, names, positive_int, positive_number, token_ids
from perseid_server.model.rope_scaling import RopeScaling, rope_from_hf
from perseid_server.model.spec import BaseSpec, LinearShape


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Everything the decoder must know beside the weights."""

    architecture: str  # a key of FAMILIES
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int  # tokens; no longer than the sliding window where there is one
    rms_norm_eps: float
    rope: RopeScaling
    tie_word_embeddings: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm over each head of q and k, before rotation
    sliding_window: int | None = None  # tokens, as the file states it; None = full attention
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"  # of the file's unquantised tensors

    @property
    def attention_scale(self) -> float:
        """What q·k is multiplied by: 1/√D."""
        return float(self.head_dim**-0.5)

    def shape(self, projection: str) -> LinearShape:
        """Shape of one projection of any layer."""
        return self.projections()[projection]

    def has_bias(self, projection: str) -> bool:
        """Whether the projection adds a bias."""
        match projection:
            case "q_proj" | "k_proj" | "v_proj":
                return self.qkv_bias
            case "o_proj":
                return self.o_bias
            case _:
                return self.mlp_bias

    def projections(self) -> dict[str, LinearShape]:
        """All projections of a layer, in the order of PARENT_OF_PROJECTION."""
        hidden, ffn = self.hidden_size, self.intermediate_size
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": LinearShape(hidden, q_width),
            "k_proj": LinearShape(hidden, kv_width),
            "v_proj": LinearShape(hidden, kv_width),
            "o_proj": LinearShape(q_width, hidden),
            "gate_proj": LinearShape(hidden, ffn),
            "up_proj": LinearShape(hidden, ffn),
            "down_proj": LinearShape(ffn, hidden),
        }


@dataclass(frozen=True, slots=True)
class Family:
    """What an architecture implies that its config does not say."""

    model_type: str
    qkv_bias: bool = False  # always
    attention_bias: bool = False  # the config's `attention_bias` puts a bias on q, k, v and o
    mlp_bias: bool = False  # the config's `mlp_bias` counts
    qk_norm: bool = False
    head_dim: int | None = None  # default; None = hidden_size / num_attention_heads
    sliding_window: int | None = None  # default where the config is silent
    window_needs_flag: bool = False  # the window counts only with `use_sliding_window`
    max_position_embeddings: int = 2048  # default


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family("llama", attention_bias=True, mlp_bias=True),
    "MistralForCausalLM": Family("mistral", sliding_window=4096, max_position_embeddings=4096 * 32),
    "Qwen2ForCausalLM": Family(
        "qwen2", qkv_bias=True, sliding_window=4096, window_needs_flag=True, max_position_embeddings=32768
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        attention_bias=True,
        qk_norm=True,
        head_dim=128,
        sliding_window=4096,
        window_needs_flag=True,
        max_position_embeddings=32768,
    ),
}
"""Supported architectures, with transformers' defaults. SmolLM2 is a LlamaForCausalLM, Qwen2.5 a Qwen2ForCausalLM."""

DEFAULT_ROPE_THETA = 10000.0
MAX_LAYERS = 4096
"""Names are made for every layer that a file claims, before its tensors are looked for."""


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a `config.json`. UnsupportedModel names the key that rules it out."""
    architecture = _architecture(config)
    family = FAMILIES[architecture]
    _refuse_other_activations(config)
    hidden_size, num_heads = positive_int(config, "hidden_size"), positive_int(config, "num_attention_heads")
    stated_positions = positive_int(config, "max_position_embeddings", family.max_position_embeddings)
    window = _sliding_window(config, family)
    attention_bias = family.attention_bias and flag(config, "attention_bias")
    return checked(
        DecoderConfig(
            architecture=architecture,
            num_layers=positive_int(config, "num_hidden_layers"),
            hidden_size=hidden_size,
            intermediate_size=positive_int(config, "intermediate_size"),
            num_heads=num_heads,
            num_kv_heads=positive_int(config, "num_key_value_heads", num_heads),
            head_dim=positive_int(config, "head_dim", family.head_dim or hidden_size // num_heads),
            vocab_size=positive_int(config, "vocab_size"),
            # Up to the window's length, sliding and full attention are the same.
            max_position_embeddings=min(stated_positions, window or stated_positions),
            rms_norm_eps=positive_number(config, "rms_norm_eps", 1e-6),
            rope=rope_from_hf(config, stated_positions, DEFAULT_ROPE_THETA),
            tie_word_embeddings=flag(config, "tie_word_embeddings"),
            qkv_bias=family.qkv_bias or attention_bias,
            o_bias=attention_bias,
            mlp_bias=family.mlp_bias and flag(config, "mlp_bias"),
            qk_norm=family.qk_norm,
            sliding_window=window,
            bos_token_id=next(iter(token_ids(config, "bos_token_id")), None),
            eos_token_ids=token_ids(config, "eos_token_id"),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."),
        )
    )


def base_spec(name: str, content_hash: str, config: DecoderConfig) -> BaseSpec:
    """What adapters and KV caches see of a decoder."""
    return BaseSpec(
        name=name,
        hash=content_hash,
        architecture=config.architecture,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        projections=config.projections(),
        eos_token_ids=config.eos_token_ids,
    )


def _architecture(config: Mapping[str, Any]) -> str:
    named = names(config, "architectures")
    if not named:
        kind = config.get("model_type")
        named = [name for name, family in FAMILIES.items() if family.model_type == kind] or [str(kind)]
    if named[0] not in FAMILIES:
        raise unsupported_architecture(named[0])
    return named[0]


def unsupported_architecture(name: str) -> UnsupportedModel:
    """The refusal of an architecture, with what could be loaded instead."""
    return UnsupportedModel(
        f"architecture {name!r} is not supported; supported: {', '.join(FAMILIES)}", field="architectures"
    )


def _refuse_other_activations(config: Mapping[str, Any]) -> None:
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModel(f"hidden_act: {activation!r} is not supported; expected 'silu'", field="hidden_act")


def _sliding_window(config: Mapping[str, Any], family: Family) -> int | None:
    """The window in tokens if any layer uses one."""
    if family.sliding_window is None:
        return None
    if family.window_needs_flag and not flag(config, "use_sliding_window"):
        return None
    if not _has_sliding_layers(config, family):
        return None
    if "sliding_window" in config and config["sliding_window"] is None:
        return None
    return positive_int(config, "sliding_window", family.sliding_window)


def _has_sliding_layers(config: Mapping[str, Any], family: Family) -> bool:
    layer_types = names(config, "layer_types")
    if layer_types:
        return "sliding_attention" in layer_types
    if not family.window_needs_flag:
        return True
    # Qwen's first max_window_layers attend to everything.
    return integer(config, "max_window_layers", 28) < positive_int(config, "num_hidden_layers")


def checked(config: DecoderConfig) -> DecoderConfig:
    """Refuse sizes that contradict one another."""
    if config.num_heads % config.num_kv_heads:
        raise UnsupportedModel(
            f"num_attention_heads ({config.num_heads}) must be a multiple of num_key_value_heads "
            f"({config.num_kv_heads})",
            field="num_key_value_heads",
        )
    if config.head_dim % 2:
        raise UnsupportedModel(f"head_dim: {config.head_dim} is odd; rotation needs pairs", field="head_dim")
    if config.num_layers > MAX_LAYERS:
        raise UnsupportedModel(f"{config.num_layers} layers; expected at most {MAX_LAYERS}", field="num_layers")
    return config

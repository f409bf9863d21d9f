"""Which tensors a checkpoint must hold: every name with its shape, checked against a file's table at open.

A tensor that is missing, left over or of another shape is refused by name: a base that loads is a base that was
read whole.
"""

from collections.abc import Iterable, Mapping

from perseid_server.errors import UnsupportedModel
from perseid_server.model.config import DecoderConfig
from perseid_server.model.spec import PARENT_OF_PROJECTION

Shapes = dict[str, tuple[int, ...]]
Matrices = dict[str, tuple[int, int]]

_GGUF_PROJECTIONS: Mapping[str, str] = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
_GGUF_NORMS: Mapping[str, str] = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


class HfNames:
    """Hugging Face's names, the same in all four families."""

    embedding = "model.embed_tokens.weight"
    final_norm = "model.norm.weight"
    lm_head = "lm_head.weight"

    @staticmethod
    def linear(layer: int, projection: str) -> str:
        return f"model.layers.{layer}.{PARENT_OF_PROJECTION[projection]}.{projection}.weight"

    @staticmethod
    def norm(layer: int, name: str) -> str:
        return f"model.layers.{layer}.{name}.weight"

    @staticmethod
    def qk_norm(layer: int, which: str) -> str:
        return f"model.layers.{layer}.self_attn.{which}_norm.weight"


class GgufNames:
    """llama.cpp's names."""

    embedding = "token_embd.weight"
    final_norm = "output_norm.weight"
    lm_head = "output.weight"

    @staticmethod
    def linear(layer: int, projection: str) -> str:
        return f"blk.{layer}.{_GGUF_PROJECTIONS[projection]}.weight"

    @staticmethod
    def norm(layer: int, name: str) -> str:
        return f"blk.{layer}.{_GGUF_NORMS[name]}.weight"

    @staticmethod
    def qk_norm(layer: int, which: str) -> str:
        return f"blk.{layer}.attn_{which}_norm.weight"


Names = type[HfNames] | type[GgufNames]


def bias_of(weight_name: str) -> str:
    """The name of the bias beside a weight."""
    return weight_name.removesuffix("weight") + "bias"


def linear_shapes(config: DecoderConfig, names: Names) -> Matrices:
    """Weights of all projections."""
    return {
        names.linear(layer, projection): (shape.out_features, shape.in_features)
        for layer in range(config.num_layers)
        for projection, shape in config.projections().items()
    }


def table_shapes(config: DecoderConfig, names: Names) -> Matrices:
    """The embedding, and the head where it is not the embedding."""
    shape = (config.vocab_size, config.hidden_size)
    shapes = {names.embedding: shape}
    if not config.tie_word_embeddings:
        shapes[names.lm_head] = shape
    return shapes


def vector_shapes(config: DecoderConfig, names: Names) -> Shapes:
    """Norms and biases."""
    shapes: Shapes = {names.final_norm: (config.hidden_size,)}
    for layer in range(config.num_layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[names.norm(layer, name)] = (config.hidden_size,)
        for projection, shape in config.projections().items():
            if config.has_bias(projection):
                shapes[bias_of(names.linear(layer, projection))] = (shape.out_features,)
        if config.qk_norm:
            for which in ("q", "k"):
                shapes[names.qk_norm(layer, which)] = (config.head_dim,)
    return shapes


def check_tensors(found: Mapping[str, tuple[int, ...]], expected: Shapes, ignored: Iterable[str] = ()) -> None:
    """Every expected tensor is there in its shape, and nothing else is, but for `ignored`."""
    for name, shape in expected.items():
        if name not in found:
            raise UnsupportedModel(f"tensor {name!r} is missing; the config asks for one of shape {shape}", field=name)
        if found[name] != shape:
            raise UnsupportedModel(f"tensor {name!r} has shape {found[name]}; the config asks for {shape}", field=name)
    left_over = sorted(found.keys() - expected.keys() - set(ignored))
    if left_over:
        others = f" (and {len(left_over) - 1} more)" if len(left_over) > 1 else ""
        raise UnsupportedModel(
            f"tensor {left_over[0]!r}{others} has no place in this architecture; serving without it could be wrong",
            field=left_over[0],
        )

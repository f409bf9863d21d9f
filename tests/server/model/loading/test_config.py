"""Configs against transformers' own reading of them; RoPE against ROPE_INIT_FUNCTIONS."""

from typing import Any

import numpy as np
import pytest
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from perseid_server.errors import UnsupportedModel
from perseid_server.model.config import FAMILIES, base_spec, from_hf
from tests.server.model.loading.files import tiny_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 2048,
}


def config_of(**changes: Any) -> dict[str, Any]:
    return LLAMA | changes


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("old_form", [False, True])
def test_agrees_with_transformers(family: str, old_form: bool) -> None:
    theirs = tiny_config(family)
    stated = theirs.to_dict()
    if old_form:  # before transformers 5, and as most hub repositories have it
        stated["rope_theta"] = stated.pop("rope_parameters")["rope_theta"]
    stated["architectures"] = [type(AutoModelForCausalLM.from_config(theirs)).__name__]
    ours = from_hf(stated)
    assert ours.hidden_size == theirs.hidden_size
    assert ours.intermediate_size == theirs.intermediate_size
    assert ours.num_layers == theirs.num_hidden_layers
    assert ours.num_heads == theirs.num_attention_heads
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.vocab_size == theirs.vocab_size
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.eos_token_ids == (2,)
    assert (ours.qkv_bias, ours.qk_norm) == (family == "qwen2", family == "qwen3")


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_transformers(family: str) -> None:
    """A config that states the least it may: what is absent must mean what it means to transformers."""
    theirs = CONFIG_MAPPING[FAMILIES[family].model_type](
        **{key: value for key, value in LLAMA.items() if key not in {"architectures", "max_position_embeddings"}}
    )
    minimal = {key: value for key, value in LLAMA.items() if key != "max_position_embeddings"}
    ours = from_hf(minimal | {"architectures": [family]})
    window = theirs.sliding_window if getattr(theirs, "sliding_window", None) else None
    assert ours.max_position_embeddings == min(theirs.max_position_embeddings, window or 1 << 60)
    assert ours.sliding_window == window
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 32)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]


def test_biases_follow_the_config() -> None:
    plain, biased = from_hf(config_of()), from_hf(config_of(attention_bias=True, mlp_bias=True))
    projections = plain.projections()
    assert not any(plain.has_bias(projection) for projection in projections)
    assert all(biased.has_bias(projection) for projection in projections)
    qwen = from_hf(config_of(architectures=["Qwen2ForCausalLM"], attention_bias=False))
    assert [p for p in projections if qwen.has_bias(p)] == ["q_proj", "k_proj", "v_proj"]


def test_architecture_by_model_type_alone() -> None:
    stated = config_of(model_type="qwen3", head_dim=32)
    del stated["architectures"]
    assert from_hf(stated).architecture == "Qwen3ForCausalLM"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "'GemmaForCausalLM'.*LlamaForCausalLM, MistralForCausalLM"),
        ({"architectures": None, "model_type": "mamba"}, "'mamba'"),
        ({"hidden_act": "gelu"}, "hidden_act.*'gelu'.*'silu'"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"vocab_size": "big"}, "vocab_size.*'big'"),
        ({"hidden_size": -1}, "hidden_size.*-1"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\).*num_key_value_heads \(3\)"),
        ({"head_dim": 33}, "head_dim: 33"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, "'longrope'.*llama3, yarn"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling\.factor.*None"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "mystery": 1}}, "unknown key 'mystery'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
    ],
)
def test_refusals_name_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        from_hf(config_of(**changes))


WRONG: dict[str, list[Any]] = {
    "architectures": ["LlamaForCausalLM", 1, [1], {"a": 1}],
    "hidden_size": ["128", 1.5, True, [128]],
    "rms_norm_eps": ["1e-5", 0, -1, [], float("nan"), float("inf")],
    "rope_theta": ["10000", 0, 1, float("inf"), [1]],
    "rope_scaling": ["linear", 2, [1], {"rope_type": ["yarn"], "factor": 2}, {"rope_type": "yarn", "factor": "2"}],
    "hidden_act": [["silu"], {}, 1],
    "tie_word_embeddings": ["true", 1, []],
    "attention_bias": ["no", 0],
    "eos_token_id": ["2", 1.5, True, {"a": 1}, [[2]], [None]],
    "bos_token_id": ["1", {}],
    "partial_rotary_factor": [[], "1"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_fields_of_another_kind_are_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(UnsupportedModel, match=key):
        from_hf(config_of(**{key: value}))


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "yarn", "factor": 2, "beta_fast": -1}, r"rope_scaling\.beta_fast.*-1"),
        ({"rope_type": "yarn", "factor": 2, "attention_factor": "x"}, r"rope_scaling\.attention_factor.*'x'"),
        ({"rope_type": "yarn", "factor": 2, "truncate": "no"}, r"rope_scaling\.truncate.*'no'"),
        ({"rope_type": "yarn", "factor": 2, "mscale": "a", "mscale_all_dim": 1}, r"rope_scaling\.mscale.*'a'"),
        (
            {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": "many"},
            r"rope_scaling\.original_max_position_embeddings.*'many'",
        ),
        (
            {"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4},
            r"rope_scaling\.high_freq_factor.*more than low_freq_factor",
        ),
    ],
)
def test_scalings_of_another_kind_are_refused_by_name(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        from_hf(config_of(rope_scaling=scaling))


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings", "eos_token_id"])
def test_null_is_absent(key: str) -> None:
    assert from_hf(config_of(**{key: None})) == from_hf(config_of())


@pytest.mark.parametrize(
    "changes", [{"sliding_window": "wide"}, {"sliding_window": 0}, {"layer_types": 3}, {"layer_types": ["full", 1]}]
)
def test_windows_of_another_kind_are_refused_by_name(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match=next(iter(changes))):
        from_hf(config_of(architectures=["MistralForCausalLM"], **changes))


@pytest.mark.parametrize(
    ("changes", "window", "positions"),
    [
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 512}, 512, 512),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, None, 2048),
        ({"architectures": ["MistralForCausalLM"]}, 4096, 2048),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 512}, None, 2048),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 512, "use_sliding_window": True}, None, 2048),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "sliding_window": 512,
                "use_sliding_window": True,
                "max_window_layers": 1,
            },
            512,
            512,
        ),
        ({"architectures": ["LlamaForCausalLM"], "sliding_window": 512}, None, 2048),
    ],
)
def test_context_ends_where_a_sliding_window_would_begin_to_matter(
    changes: dict[str, Any], window: int | None, positions: int
) -> None:
    config = from_hf(config_of(**changes))
    assert (config.sliding_window, config.max_position_embeddings) == (window, positions)


ROPES: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 128, "truncate": False},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.25},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5},
    {"rope_type": "dynamic", "factor": 4.0},
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: f"{rope['rope_type']}-{len(rope)}-{rope['factor']}")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_frequencies_equal_transformers(rope: dict[str, Any], head_dim: int, theta: float) -> None:
    settings = {key: value for key, value in LLAMA.items() if key != "architectures"}
    theirs = LlamaConfig(**settings, head_dim=head_dim, rope_parameters={**rope, "rope_theta": theta})
    expected, scaling = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, "cpu")
    ours = from_hf(config_of(head_dim=head_dim, rope_theta=theta, rope_scaling=rope)).rope
    # Our power and torch's may round a last bit differently; each later product doubles it at most.
    np.testing.assert_array_max_ulp(ours.inv_freq(head_dim), expected.numpy(), maxulp=4)
    assert ours.attention_scaling == pytest.approx(scaling, abs=1e-12)


def test_default_frequencies_equal_transformers() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    expected = model.model.rotary_emb.inv_freq.numpy()
    ours = from_hf(tiny_config("llama").to_dict() | {"architectures": ["LlamaForCausalLM"]})
    np.testing.assert_array_max_ulp(ours.rope.inv_freq(64), expected, maxulp=1)


def test_base_spec() -> None:
    spec = base_spec("tiny", "abc", from_hf(config_of(head_dim=16, eos_token_id=[3, 4])))
    assert (spec.name, spec.hash, spec.eos_token_ids) == ("tiny", "abc", (3, 4))
    assert (spec.projections["q_proj"].out_features, spec.projections["o_proj"].in_features) == (64, 64)
    assert spec.projections["down_proj"].in_features == 256

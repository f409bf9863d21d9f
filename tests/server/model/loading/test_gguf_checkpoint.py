"""A whole GGUF against transformers' reading of the same file, bit for bit; and what must be refused."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from perseid_server.errors import UnsupportedModel
from perseid_server.model.checkpoint import Checkpoint, open_checkpoint
from perseid_server.model.checkpoint.layout import HfNames, bias_of
from perseid_server.model.source import ModelSource
from tests.server.model.loading.files import SHAPE, gguf_name, tiny_config, tiny_model, write_gguf


def opened(path: Path) -> Checkpoint:
    return open_checkpoint(ModelSource("gguf", path, "tiny", str(path)))


def state_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """All tensors under Hugging Face's names, dequantised."""
    config = checkpoint.config
    state = {
        HfNames.embedding: checkpoint.embedding().dequantize(),
        HfNames.final_norm: checkpoint.final_norm(),
    }
    head = checkpoint.lm_head()
    if head is not None:
        state[HfNames.lm_head] = head.dequantize()
    for layer in range(config.num_layers):
        for projection in config.projections():
            name = HfNames.linear(layer, projection)
            state[name] = checkpoint.linear(layer, projection).dequantize()
            bias = checkpoint.bias(layer, projection)
            if bias is not None:
                state[bias_of(name)] = bias
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[HfNames.norm(layer, norm)] = checkpoint.norm(layer, norm)
        if config.qk_norm:
            for which in ("q", "k"):
                state[HfNames.qk_norm(layer, which)] = checkpoint.qk_norm(layer, which)
    return state


def state_by_transformers(path: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


@pytest.mark.parametrize(
    ("family", "linears", "tables", "tied"),
    [
        ("llama", "Q4_1", "Q8_0", True),
        ("llama", "Q4_0", "Q6_K", False),
        ("llama", "Q4_K", "Q6_K", False),
        ("llama", "Q6_K", "F16", True),
        ("llama", "Q8_0", "Q4_0", False),
        ("qwen2", "Q4_K", "Q8_0", False),
        ("qwen2", "BF16", "BF16", True),
        ("qwen3", "Q4_1", "F32", False),
    ],
)
def test_equals_transformers(tmp_path: Path, family: str, linears: str, tables: str, tied: bool) -> None:
    config = tiny_config(family, tie_word_embeddings=tied)
    path = write_gguf(tmp_path / "tiny.gguf", config, tiny_model(config), linears, tables)
    ours, theirs = state_of(opened(path)), state_by_transformers(path)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_llama_rows_return_to_hugging_face_order(tmp_path: Path) -> None:
    config = tiny_config("llama")
    weights = tiny_model(config)
    path = write_gguf(tmp_path / "tiny.gguf", config, weights, linears="F32")
    checkpoint = opened(path)
    for projection in ("q_proj", "k_proj", "v_proj"):
        name = HfNames.linear(1, projection)
        assert torch.equal(checkpoint.linear(1, projection).dequantize(), weights[name])


def test_biases_of_q_and_k_are_permuted_like_their_rows(tmp_path: Path) -> None:
    config = tiny_config("llama", attention_bias=True)
    weights = tiny_model(config)
    checkpoint = opened(write_gguf(tmp_path / "tiny.gguf", config, weights))
    assert checkpoint.config.qkv_bias
    assert checkpoint.config.o_bias
    for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
        expected = weights[bias_of(HfNames.linear(0, projection))]
        assert torch.equal(checkpoint.bias(0, projection), expected), projection
    assert checkpoint.bias(0, "up_proj") is None


def test_spec_and_config(tmp_path: Path) -> None:
    config = tiny_config("llama")
    path = write_gguf(tmp_path / "tiny.gguf", config, tiny_model(config))
    checkpoint = opened(path)
    spec = checkpoint.spec
    assert (spec.num_layers, spec.hidden_size, spec.head_dim, spec.vocab_size) == (2, 256, 64, 96)
    assert spec.architecture == "LlamaForCausalLM"
    assert spec.fused_shape("qkv").out_features == 256 + 128 + 128
    assert spec.eos_token_ids == (2,)
    assert re.fullmatch(r"[0-9a-f]{64}", spec.hash)


def test_hash_follows_the_content_wherever_it_changes(tmp_path: Path) -> None:
    config = tiny_config("llama")
    path = write_gguf(tmp_path / "tiny.gguf", config, tiny_model(config))
    before = opened(path).spec.hash
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert opened(path).spec.hash != before
    content[len(content) // 2] ^= 1
    (tmp_path / "other-name.gguf").write_bytes(content)
    assert opened(tmp_path / "other-name.gguf").spec.hash == before


def test_rope_factors_tensor_scales_frequencies(tmp_path: Path) -> None:
    config = tiny_config("llama")
    factors = np.linspace(1, 8, 32, dtype=np.float32)
    plain = opened(write_gguf(tmp_path / "plain.gguf", config, tiny_model(config))).config
    scaled = opened(
        write_gguf(tmp_path / "tiny.gguf", config, tiny_model(config), extra={"rope_freqs.weight": factors})
    ).config
    assert scaled.rope.type == "factors"
    np.testing.assert_array_equal(scaled.rope.inv_freq(64), plain.rope.inv_freq(64) / factors)


def test_tensor_without_a_place_is_refused_by_name(tmp_path: Path) -> None:
    config = tiny_config("llama")
    extra = {"blk.0.attn_q_norm.weight": np.ones(64, np.float32)}
    path = write_gguf(tmp_path / "tiny.gguf", config, tiny_model(config), extra=extra)
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.attn_q_norm\.weight"):
        opened(path)


@pytest.mark.parametrize(
    "missing", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.layers.0.self_attn.k_proj.bias"]
)
def test_missing_tensor_is_refused_by_name(tmp_path: Path, missing: str) -> None:
    config = tiny_config("qwen2")
    weights = tiny_model(config)
    del weights[missing]
    path = write_gguf(tmp_path / "tiny.gguf", config, weights)
    with pytest.raises(UnsupportedModel, match=re.escape(gguf_name(missing))):
        opened(path)


def test_wrong_shape_is_refused_with_both_shapes(tmp_path: Path) -> None:
    config = tiny_config("llama")
    weights = tiny_model(config)
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(256, 256)
    path = write_gguf(tmp_path / "tiny.gguf", config, weights)
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.ffn_up\.weight.*\(256, 256\).*\(512, 256\)"):
        opened(path)


@pytest.mark.parametrize("kind", ["Q5_0", "Q5_1"])
def test_other_types_are_refused_by_tensor_and_type(tmp_path: Path, kind: str) -> None:
    config = tiny_config("llama")
    path = write_gguf(tmp_path / "tiny.gguf", config, tiny_model(config), linears=kind)
    with pytest.raises(UnsupportedModel, match=rf"blk\.0\..*{kind}.*Q4_K"):
        opened(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_count", 8),
        ("logit_scale", 16.0),
        ("attn_logit_softcapping", 50.0),
        ("rope.scaling.type", "longrope"),
        ("attention.value_length", 32),
    ],
)
def test_keys_that_change_the_mathematics_are_refused(tmp_path: Path, key: str, value: object) -> None:
    config = tiny_config("llama")
    path = write_gguf(tmp_path / "tiny.gguf", config, tiny_model(config), metadata={key: value})
    with pytest.raises(UnsupportedModel, match=re.escape(key)):
        opened(path)


def test_yarn_in_metadata(tmp_path: Path) -> None:
    config = tiny_config("qwen2")
    metadata = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": SHAPE["max_position_embeddings"] // 4,
    }
    rope = opened(write_gguf(tmp_path / "tiny.gguf", config, tiny_model(config), metadata=metadata)).config.rope
    assert (rope.type, rope.factor, rope.original_max_position_embeddings) == ("yarn", 4.0, 128)
    assert rope.attention_scaling == pytest.approx(0.1 * np.log(4) + 1)


def test_unknown_architecture_lists_the_supported_ones(tmp_path: Path) -> None:
    config = tiny_config("llama")
    path = write_gguf(tmp_path / "tiny.gguf", config, tiny_model(config))
    content = path.read_bytes().replace(b"llama", b"gemma")
    path.write_bytes(content)
    with pytest.raises(UnsupportedModel, match=r"'gemma'.*LlamaForCausalLM.*Qwen3ForCausalLM"):
        opened(path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    config = tiny_config("llama")
    path = write_gguf(tmp_path / "tiny.gguf", config, tiny_model(config))
    content = path.read_bytes()
    broken = tmp_path / "broken.gguf"
    for length in (2, 20, 100, 400, len(content) // 2, len(content) - 40):
        broken.write_bytes(content[:length])
        with pytest.raises(UnsupportedModel, match=r"broken\.gguf"):
            opened(broken)

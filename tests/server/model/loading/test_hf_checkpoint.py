"""Hugging Face folders: 16-bit quantised while loading, bitsandbytes, GPTQ, AWQ, and what must be refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from perseid_kernels.weights import DenseWeight, Int4Weight
from perseid_server.errors import UnsupportedModel
from perseid_server.model.checkpoint import Checkpoint, open_checkpoint
from perseid_server.model.checkpoint.affine import affine_weight
from perseid_server.model.checkpoint.layout import HfNames, bias_of
from perseid_server.model.checkpoint.nf4 import quantize_nf4
from perseid_server.model.source import ModelSource
from tests.server.model.loading.files import tiny_config, tiny_model, write_hf

Weights = dict[str, Tensor]
LINEAR = re.compile(r".*_proj\.weight")


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(ModelSource("hf", folder, "tiny", str(folder)))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, edit: Callable[[Weights], None]) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file({name: value.contiguous() for name, value in weights.items()}, path)


# --- 16 bit -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_linears_become_nf4_and_the_rest_is_kept(tmp_path: Path, family: str) -> None:
    config = tiny_config(family)
    weights = {name: value.to(torch.bfloat16) for name, value in tiny_model(config).items()}
    checkpoint = opened(write_hf(tmp_path, config, weights))
    for layer in range(2):
        for projection in checkpoint.config.projections():
            name = HfNames.linear(layer, projection)
            weight = checkpoint.linear(layer, projection)
            assert isinstance(weight, Int4Weight)
            assert torch.equal(weight.dequantize(), quantize_nf4(weights[name]).dequantize())
            bias = checkpoint.bias(layer, projection)
            if bias_of(name) in weights:
                assert torch.equal(bias, weights[bias_of(name)].float())
            else:
                assert bias is None
        for norm in ("input_layernorm", "post_attention_layernorm"):
            assert torch.equal(checkpoint.norm(layer, norm), weights[HfNames.norm(layer, norm)].float())
        if family == "qwen3":
            assert torch.equal(checkpoint.qk_norm(layer, "k"), weights[HfNames.qk_norm(layer, "k")].float())
    embedding, head = checkpoint.embedding(), checkpoint.lm_head()
    assert isinstance(embedding, DenseWeight)
    assert embedding.values.dtype == torch.bfloat16
    assert torch.equal(embedding.values, weights[HfNames.embedding])
    assert torch.equal(head.values, weights[HfNames.lm_head])


def test_sharded_folder_reads_like_a_single_file(tmp_path: Path) -> None:
    config = tiny_config("llama")
    weights = tiny_model(config)
    folder = write_hf(tmp_path, config, weights)
    names = sorted(weights)
    (folder / "model.safetensors").unlink()
    files = {"model-00001-of-00002.safetensors": names[:7], "model-00002-of-00002.safetensors": names[7:]}
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = opened(folder)
    for name in ("q_proj", "down_proj"):
        expected = quantize_nf4(weights[HfNames.linear(1, name)]).dequantize()
        assert torch.equal(checkpoint.linear(1, name).dequantize(), expected)


def test_tied_embeddings_have_no_head(tmp_path: Path) -> None:
    config = tiny_config("llama", tie_word_embeddings=True)
    folder = write_hf(tmp_path, config, tiny_model(config))
    assert opened(folder).lm_head() is None
    edit_weights(folder, lambda weights: weights.update({HfNames.lm_head: weights[HfNames.embedding].clone()}))
    assert opened(folder).lm_head() is None
    edit_weights(folder, lambda weights: weights[HfNames.lm_head].mul_(2))
    with pytest.raises(UnsupportedModel, match=r"lm_head\.weight.*tie_word_embeddings"):
        opened(folder).lm_head()


def test_end_tokens_come_from_both_configs(tmp_path: Path) -> None:
    config = tiny_config("llama", eos_token_id=2)
    folder = write_hf(tmp_path, config, tiny_model(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 2, 7]}')
    assert opened(folder).spec.eos_token_ids == (5, 2, 7)


def test_hash_covers_weights_and_config(tmp_path: Path) -> None:
    config = tiny_config("llama")
    folder = write_hf(tmp_path / "a", config, tiny_model(config))
    first = opened(folder).spec.hash
    assert opened(write_hf(tmp_path / "b", config, tiny_model(config))).spec.hash == first
    edit_json(folder / "config.json", rms_norm_eps=1e-5)
    second = opened(folder).spec.hash
    edit_weights(folder, lambda weights: weights[HfNames.final_norm].mul_(1.5))
    assert len({first, second, opened(folder).spec.hash}) == 3


def test_rotary_buffers_of_old_files_are_ignored(tmp_path: Path) -> None:
    config = tiny_config("llama")
    weights = tiny_model(config) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32)}
    assert opened(write_hf(tmp_path, config, weights)).config.num_layers == 2


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), r"model\.layers\.1\.mlp\.up_proj\.weight.*missing"),
        (lambda w: w.pop("model.norm.weight"), r"model\.norm\.weight.*missing"),
        (
            lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(256)}),
            r"model\.layers\.0\.self_attn\.q_proj\.bias.*no place",
        ),
        (
            lambda w: w.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2, 2)}),
            r"model\.layers\.2\.mlp\.up_proj\.weight.*no place",
        ),
        (
            lambda w: w.update({"model.layers.0.mlp.up_proj.weight": torch.ones(512, 128)}),
            r"model\.layers\.0\.mlp\.up_proj\.weight.*\(512, 128\).*\(512, 256\)",
        ),
        (
            lambda w: w.update({"model.layers.0.mlp.up_proj.weight": torch.ones(512, 256, dtype=torch.int8)}),
            r"model\.layers\.0\.mlp\.up_proj\.weight.*I8.*BF16",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, edit: Callable[[Weights], Any], message: str) -> None:
    config = tiny_config("llama")
    folder = write_hf(tmp_path, config, tiny_model(config))
    edit_weights(folder, edit)
    with pytest.raises(UnsupportedModel, match=message):
        opened(folder)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "fp8"}, "'fp8'.*supported: bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "load_in_8bit"),
        ({"quant_method": "gptq", "bits": 8}, "gptq with 8 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'marlin'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "'gemv'"),
    ],
)
def test_quantisations_are_refused_by_name(tmp_path: Path, quantization: dict[str, Any], message: str) -> None:
    config = tiny_config("llama")
    folder = write_hf(tmp_path, config, tiny_model(config))
    edit_json(folder / "config.json", quantization_config=quantization)
    with pytest.raises(UnsupportedModel, match=message):
        opened(folder)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    config = tiny_config("llama")
    folder = write_hf(tmp_path, config, tiny_model(config))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match=r"pytorch_model\.bin is not read.*safetensors"):
        opened(folder)


def test_damaged_safetensors_are_refused(tmp_path: Path) -> None:
    config = tiny_config("llama")
    path = write_hf(tmp_path, config, tiny_model(config)) / "model.safetensors"
    content = path.read_bytes()
    for length in (0, 5, 30, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(UnsupportedModel, match=r"model\.safetensors"):
            opened(tmp_path)


def test_a_weight_with_nan_is_refused_by_name(tmp_path: Path) -> None:
    config = tiny_config("llama")
    weights = tiny_model(config)
    weights[HfNames.linear(0, "o_proj")][3, 3] = float("nan")
    checkpoint = opened(write_hf(tmp_path, config, weights))
    with pytest.raises(UnsupportedModel, match=r"self_attn\.o_proj\.weight.*NaN"):
        checkpoint.linear(0, "o_proj")


# --- bitsandbytes -----------------------------------------------------------------------------------------------


def bnb_folder(folder: Path, kind: str, nested: bool, block: int) -> dict[str, Tensor]:
    """Write a bitsandbytes checkpoint; returns what bitsandbytes dequantises each linear to."""
    config = tiny_config("llama", num_hidden_layers=1)
    stored: Weights = {}
    expected: Weights = {}
    for name, value in tiny_model(config).items():
        weight = value.to(torch.bfloat16)
        # One module is left out of the quantisation, as llm_int8_skip_modules does.
        if not LINEAR.fullmatch(name) or "v_proj" in name:
            stored[name] = weight
            continue
        codes, state = bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=nested, blocksize=block)
        stored[name] = codes
        stored |= {f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
        state.dtype = torch.float32
        expected[name] = bnb.dequantize_4bit(codes, state)
    write_hf(folder, config, stored)
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    edit_json(folder / "config.json", quantization_config=quantization)
    return expected


@pytest.mark.parametrize(
    ("kind", "nested", "block"), [("nf4", True, 64), ("nf4", False, 64), ("fp4", True, 64), ("nf4", True, 256)]
)
def test_bitsandbytes_is_bit_exact(tmp_path: Path, kind: str, nested: bool, block: int) -> None:
    expected = bnb_folder(tmp_path, kind, nested, block)
    checkpoint = opened(tmp_path)
    for projection in checkpoint.config.projections():
        weight = checkpoint.linear(0, projection)
        if projection == "v_proj":
            assert isinstance(weight, DenseWeight)
            continue
        assert isinstance(weight, Int4Weight)
        assert weight.group_size == min(block, 128)
        assert torch.equal(weight.dequantize(), expected[HfNames.linear(0, projection)]), projection


def test_bitsandbytes_codes_of_another_size_are_refused(tmp_path: Path) -> None:
    bnb_folder(tmp_path, "nf4", nested=True, block=64)
    name = HfNames.linear(0, "up_proj")
    edit_weights(tmp_path, lambda weights: weights.update({name: weights[name][:-1]}))
    with pytest.raises(UnsupportedModel, match=r"up_proj\.weight.*65535 bytes.*65536"):
        opened(tmp_path)


def test_bitsandbytes_without_its_state_is_refused(tmp_path: Path) -> None:
    bnb_folder(tmp_path, "nf4", nested=True, block=64)
    edit_weights(tmp_path, lambda weights: weights.pop(HfNames.linear(0, "up_proj") + ".absmax"))
    with pytest.raises(UnsupportedModel, match=r"up_proj\.weight\.absmax.*missing"):
        opened(tmp_path)


def test_bitsandbytes_block_maxima_must_fit(tmp_path: Path) -> None:
    bnb_folder(tmp_path, "nf4", nested=True, block=64)
    name = HfNames.linear(0, "up_proj") + ".absmax"
    edit_weights(tmp_path, lambda weights: weights.update({name: weights[name][1:]}))
    with pytest.raises(UnsupportedModel, match=r"up_proj\.weight\.absmax.*\(2047,\).*\(2048,\)"):
        opened(tmp_path)


# --- GPTQ and AWQ -----------------------------------------------------------------------------------------------


def pack(codes: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight neighbours of a row into one int32, neighbour order[k] at bit 4k. Written from the formats' description,
    with integer arithmetic, so that it shares nothing with the reader."""
    rows, columns = codes.shape
    packed = [
        [sum(int(codes[r, 8 * c + order[k]]) << (4 * k) for k in range(8)) for c in range(columns // 8)]
        for r in range(rows)
    ]
    return torch.tensor(packed, dtype=torch.int64).to(torch.int32)


def affine_folder(
    folder: Path, method: str, group: int, symmetric: bool, edit: Callable[[Weights], None] | None = None
) -> dict[str, Tensor]:
    """A GPTQ or AWQ checkpoint with random codes; returns the matrices it stands for."""
    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = tiny_config("llama", **small)
    generator = torch.Generator().manual_seed(5)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    stored: Weights = {}
    expected: Weights = {}
    for name, value in tiny_model(config).items():
        if not LINEAR.fullmatch(name):
            stored[name] = value.half()
            continue
        num_outputs, num_inputs = value.shape
        num_groups = -(-num_inputs // group)
        codes = torch.randint(0, 16, (num_inputs, num_outputs), generator=generator)
        zeros = torch.randint(0, 16, (num_groups, num_outputs), generator=generator)
        if symmetric:
            zeros = torch.full_like(zeros, 8)
        scales = (torch.rand(num_groups, num_outputs, generator=generator) * 0.01 + 1e-3).half()
        groups = torch.arange(num_inputs) // group
        expected[name] = ((codes - zeros[groups]).float() * scales[groups].float()).t()
        stem = name.removesuffix("weight")
        stored[stem + "scales"] = scales
        if method == "gptq":
            stored[stem + "qweight"] = pack(codes.t()).t()
            stored[stem + "qzeros"] = pack((zeros - 1) % 16)
            stored[stem + "g_idx"] = groups.to(torch.int32)
        else:
            stored[stem + "qweight"] = pack(codes, order)
            stored[stem + "qzeros"] = pack(zeros, order)
    if edit is not None:
        edit(stored)
    write_hf(folder, config, stored)
    settings = {"quant_method": method, "bits": 4, "group_size": group, "desc_act": False, "version": "gemm"}
    edit_json(folder / "config.json", quantization_config=settings)
    return expected


@pytest.mark.parametrize(("method", "group"), [("gptq", 32), ("gptq", 48), ("awq", 32)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_and_awq_are_exact(tmp_path: Path, method: str, group: int, symmetric: bool) -> None:
    """With 48 the last group of a row is shorter than the others."""
    expected = affine_folder(tmp_path, method, group, symmetric)
    checkpoint = opened(tmp_path)
    for projection in checkpoint.config.projections():
        weight = checkpoint.linear(0, projection)
        assert isinstance(weight, Int4Weight)
        assert (weight.offset is None) == symmetric
        assert torch.equal(weight.dequantize(), expected[HfNames.linear(0, projection)]), projection


def test_groups_longer_than_128_are_cut() -> None:
    codes = torch.randint(0, 256, (3, 256), dtype=torch.uint8)
    scale, zero = torch.rand(1, 3).half(), torch.tensor([[1, 2, 3]])
    weight = affine_weight(codes, scale, zero, group_size=-1)
    assert weight.group_size == 128
    assert weight.scale.shape == (3, 4)
    whole = torch.stack((codes & 0xF, codes >> 4), dim=-1).view(3, 512).float()
    assert torch.equal(weight.dequantize(), (whole - zero.t()) * scale.t().float())


def test_act_order_is_refused_by_name(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.g_idx"
    affine_folder(tmp_path, "gptq", 32, True, lambda stored: stored.update({name: stored[name].flip(0)}))
    with pytest.raises(UnsupportedModel, match=r"up_proj\.g_idx.*desc_act"):
        opened(tmp_path)

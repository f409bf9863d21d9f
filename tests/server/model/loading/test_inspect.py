"""`perseid inspect` on bases: what is served is described, what is not is described with the reason."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from perseid_server.errors import UnsupportedModel
from perseid_server.model.checkpoint import open_checkpoint
from perseid_server.model.checkpoint.layout import HfNames
from perseid_server.model.config import FAMILIES
from perseid_server.model.inspect import inspect_model
from perseid_server.model.source import ModelSource, resolve_model
from tests.server.model.loading.files import tiny_config, tiny_model, write_gguf, write_hf
from tests.server.model.loading.test_hf_checkpoint import affine_folder, bnb_folder, edit_json, edit_weights
from tests.server.model.loading.test_tokenizer import SPLITTINGS, original


def write_folder(folder: Path, **changes: object) -> Path:
    config = tiny_config("qwen2", **changes)
    weights = {name: value.to(torch.bfloat16) for name, value in tiny_model(config).items()}
    write_hf(folder, config, weights)
    original(SPLITTINGS["qwen2"]).save(str(folder / "tokenizer.json"))
    return folder


def test_accepted_folder(tmp_path: Path) -> None:
    report = inspect_model(str(write_folder(tmp_path / "tiny")))
    assert report.accepted, report.reason
    assert (report.architecture, report.name, report.kind) == ("Qwen2ForCausalLM", "tiny", "hf")
    assert report.num_parameters == sum(value.numel() for value in tiny_model(tiny_config("qwen2")).values())
    assert [(one.type, one.num_bytes) for one in report.tensor_types] == [("BF16", 2 * report.num_parameters)]
    assert (report.context_length, report.vocab_size, report.tied_embeddings) == (512, 96, False)
    assert report.has_chat_template is False
    assert "NF4" in report.quantization


def test_refused_folder_is_still_described(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tiny")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["PhiForCausalLM"]}))
    report = inspect_model(str(folder))
    assert not report.accepted
    assert "PhiForCausalLM" in report.reason
    assert report.architecture == "PhiForCausalLM"
    assert report.num_parameters is None
    assert report.num_bytes > 0


def test_gguf_counts_its_types(tmp_path: Path) -> None:
    config = tiny_config("llama")
    path = write_gguf(tmp_path / "tiny.gguf", config, tiny_model(config), linears="Q4_0", tables="Q8_0")
    report = inspect_model(str(path))
    counts = {one.type: one.num_tensors for one in report.tensor_types}
    assert counts == {"Q4_0": 14, "Q8_0": 2, "F32": 5}
    assert report.num_parameters == sum(value.numel() for value in tiny_model(config).values())
    assert report.quantization == "Q4_0"
    # The weights would do, but nobody could write to this model: the file holds no vocabulary.
    assert not report.accepted
    assert "holds no vocabulary" in report.reason


@pytest.mark.parametrize(("method", "type_of_most"), [("gptq", "I32"), ("awq", "I32"), ("bitsandbytes", "U8")])
def test_quantised_folders(tmp_path: Path, method: str, type_of_most: str) -> None:
    if method == "bitsandbytes":
        bnb_folder(tmp_path, "nf4", nested=True, block=64)
    else:
        affine_folder(tmp_path, method, 32, symmetric=False)
    original(SPLITTINGS["qwen2"]).save(str(tmp_path / "tokenizer.json"))
    report = inspect_model(str(tmp_path))
    assert report.accepted, report.reason
    assert report.quantization == method
    assert type_of_most in {one.type for one in report.tensor_types}
    config = open_checkpoint(resolve_model(str(tmp_path))).config
    weights = tiny_model(
        tiny_config(
            "llama",
            hidden_size=config.hidden_size,
            num_hidden_layers=1,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_heads,
        )
    )
    assert report.num_parameters == sum(value.numel() for value in weights.values())


def without_a_tensor(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.pop(HfNames.linear(1, "k_proj")))


def with_a_wrong_shape(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({HfNames.final_norm: torch.ones(7)}))


def with_unknown_quantisation(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": "hqq"})


def with_unknown_scaling(folder: Path) -> None:
    edit_json(folder / "config.json", rope_scaling={"rope_type": "longrope", "factor": 2})


def without_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (without_a_tensor, "model.layers.1.self_attn.k_proj.weight"),
        (with_a_wrong_shape, "'model.norm.weight' has shape (7,); the config asks for (256,)"),
        (with_unknown_quantisation, "method 'hqq' is not supported; supported: bitsandbytes"),
        (with_unknown_scaling, "'longrope' is not supported; supported: default, linear"),
        (without_a_tokenizer, "tokenizer.json"),
    ],
)
def test_a_report_says_what_is_wrong(tmp_path: Path, damage: Callable[[Path], None], reason: str) -> None:
    folder = write_folder(tmp_path / "tiny")
    damage(folder)
    report = inspect_model(str(folder))
    assert not report.accepted
    assert reason in report.reason
    assert report.architecture == "Qwen2ForCausalLM"


def test_a_truncated_file_has_no_report(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "tiny") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UnsupportedModel, match=r"model\.safetensors.*cut short"):
        inspect_model(str(path.parent))


@pytest.mark.parametrize("stated", ["GemmaForCausalLM", ["GemmaForCausalLM"], None])
def test_an_unsupported_architecture_is_named_with_what_is_supported(tmp_path: Path, stated: object) -> None:
    folder = write_folder(tmp_path / "tiny")
    edit_json(folder / "config.json", architectures=stated, model_type="gemma")
    report = inspect_model(str(folder))
    assert not report.accepted
    assert report.architecture in {"GemmaForCausalLM", "gemma"}
    if not isinstance(stated, str):
        assert f"'{report.architecture}' is not supported; supported: {', '.join(FAMILIES)}" in report.reason
        with pytest.raises(UnsupportedModel, match="LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM"):
            open_checkpoint(ModelSource("hf", folder, "tiny", str(folder)))


def test_an_unsupported_gguf_architecture_is_named_with_what_is_supported(tmp_path: Path) -> None:
    config = tiny_config("llama")
    path = write_gguf(tmp_path / "tiny.gguf", config, tiny_model(config))
    content = path.read_bytes()
    path.write_bytes(
        content.replace(
            b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama",
            b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0rwkv6",
        )
    )
    report = inspect_model(str(path))
    assert report.architecture == "rwkv6"
    assert f"'rwkv6' is not supported; supported: {', '.join(FAMILIES)}" in report.reason


@pytest.mark.e2e
def test_embedded_base() -> None:
    report = inspect_model("embedded")
    assert report.accepted
    assert (report.num_parameters, report.quantization, report.has_chat_template) == (134_515_008, "Q4_1", True)

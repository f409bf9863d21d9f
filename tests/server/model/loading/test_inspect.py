"""`perseid inspect` on bases: what is served is described, what is not is described with the reason."""

import json
from pathlib import Path

import pytest
import torch

from perseid_server.model.inspect import inspect_model
from tests.server.model.loading.files import tiny_config, tiny_model, write_gguf, write_hf
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


@pytest.mark.e2e
def test_embedded_base() -> None:
    report = inspect_model("embedded")
    assert report.accepted
    assert (report.num_parameters, report.quantization, report.has_chat_template) == (134_515_008, "Q4_1", True)

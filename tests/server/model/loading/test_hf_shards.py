"""Folders whose files are damaged: cut short, at odds with their index, or lying about themselves."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from perseid_server.errors import UnsupportedModel
from perseid_server.model.checkpoint.layout import HfNames
from tests.server.model.loading.files import tiny_config, tiny_model, write_hf
from tests.server.model.tiny import SMALL, opened

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
UP = HfNames.linear(1, "up_proj")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A sound folder of two shards; layer 1 is in the second."""
    config = tiny_config("llama", **SMALL)
    weights = tiny_model(config)
    folder = write_hf(tmp_path, config, {})
    (folder / "model.safetensors").unlink()
    place = {name: SECOND if "layers.1" in name else FIRST for name in weights}
    for file in (FIRST, SECOND):
        save_file({name: value for name, value in weights.items() if place[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": place}))
    assert opened(folder).config.num_layers == 2
    return folder


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(path: Path, header: Mapping[str, Any], data: bytes) -> None:
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


@pytest.mark.parametrize("file", [FIRST, SECOND])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_shard_is_named(sharded: Path, file: str, kept: float) -> None:
    content = (sharded / file).read_bytes()
    (sharded / file).write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(UnsupportedModel, match=rf"{file}.*cut short"):
        opened(sharded)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    with pytest.raises(UnsupportedModel, match=f"{INDEX} names {SECOND}"):
        opened(sharded)


def test_a_shard_without_one_of_its_tensors(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], FIRST)
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.1\..*missing"):
        opened(sharded)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    header, data = header_of(sharded / SECOND)
    header[HfNames.final_norm] = header.pop(HfNames.norm(1, "input_layernorm"))
    write_header(sharded / SECOND, header, data)
    with pytest.raises(UnsupportedModel, match=rf"{HfNames.final_norm}.*{FIRST} and in {SECOND}"):
        opened(sharded)


@pytest.mark.parametrize("weight_map", [{"a": "../elsewhere.safetensors"}, {"a": 3}, "all", [1]])
def test_an_index_must_name_files_beside_it(sharded: Path, weight_map: object) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UnsupportedModel, match="weight_map"):
        opened(sharded)


def test_a_header_whose_sizes_contradict_each_other(sharded: Path) -> None:
    header, data = header_of(sharded / SECOND)
    header[UP]["dtype"] = "F16"  # half of the bytes it occupies
    write_header(sharded / SECOND, header, data)
    with pytest.raises(UnsupportedModel, match=SECOND):
        opened(sharded).linear(1, "up_proj")


def test_a_shard_removed_after_opening_is_named(sharded: Path) -> None:
    checkpoint = opened(sharded)
    (sharded / SECOND).unlink()
    with pytest.raises(UnsupportedModel, match=f"{SECOND} cannot be read"):
        checkpoint.linear(1, "up_proj")


def test_what_was_read_does_not_change_with_its_file(sharded: Path) -> None:
    """A base in use keeps embedding and norms as they were, even when its files are overwritten in place."""
    checkpoint = opened(sharded)
    embedding, norm = checkpoint.embedding().values, checkpoint.final_norm()
    kept = embedding.clone(), norm.clone()
    with (sharded / FIRST).open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(0)
        file.write(bytes(size))
    assert torch.equal(embedding, kept[0])
    assert torch.equal(norm, kept[1])


@pytest.mark.parametrize("config", ["", "{", "[]", "3"])
def test_a_config_that_is_no_object(sharded: Path, config: str) -> None:
    (sharded / "config.json").write_text(config)
    with pytest.raises(UnsupportedModel, match=r"config\.json"):
        opened(sharded)


@pytest.mark.parametrize("quantization", ["gptq", [4], {"quant_method": "gptq", "bits": 4, "group_size": "all"}])
def test_a_quantization_config_of_another_kind(sharded: Path, quantization: object) -> None:
    config = json.loads((sharded / "config.json").read_text()) | {"quantization_config": quantization}
    (sharded / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="quantization_config"):
        opened(sharded)

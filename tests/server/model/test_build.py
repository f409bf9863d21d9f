"""Loading a base: one matrix at a time in 16 bit, packed at once; and the bytes reported are the bytes held."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from perseid_server.errors import UnsupportedModel
from perseid_server.model.build import build_decoder
from perseid_server.model.checkpoint.layout import HfNames
from perseid_server.model.checkpoint.safetensors import TensorReader
from perseid_server.model.decoder import Decoder
from tests.server.model.loading.files import tiny_config, tiny_model, write_hf
from tests.server.model.passes import CPU, backend_named, decoder_of
from tests.server.model.tiny import SMALL, opened, write_tiny


class ReadWatch:
    """Every tensor the reader hands out, and how many bytes of them were alive at once."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.peak = {"linears": 0, "all": 0}
        self._alive: list[tuple[str, StorageWeakRef, int]] = []

    def note(self, name: str, tensor: Tensor) -> None:
        self.counts[name] += 1
        self._alive = [entry for entry in self._alive if not entry[1].expired()]
        self._alive.append((name, StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage().nbytes()))
        linears = sum(size for held, _, size in self._alive if "_proj.weight" in held)
        self.peak["linears"] = max(self.peak["linears"], linears)
        self.peak["all"] = max(self.peak["all"], sum(size for _, _, size in self._alive))


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> ReadWatch:
    watching = ReadWatch()
    read = TensorReader.read

    def watched(reader: TensorReader, name: str) -> Tensor:
        tensor = read(reader, name)
        watching.note(name, tensor)
        return tensor

    monkeypatch.setattr(TensorReader, "read", watched)
    return watching


@pytest.fixture(params=["eager", "native"])
def backend_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("tied", [True, False])
def test_one_matrix_at_a_time_is_held_in_16_bit(
    tmp_path: Path, watch: ReadWatch, backend_name: str, tied: bool
) -> None:
    folder = write_tiny(tmp_path, "llama", torch.bfloat16, tie_word_embeddings=tied, num_hidden_layers=6)
    decoder = decoder_of(opened(folder), backend_named(backend_name), 64)
    largest = max(prod((shape.out_features, shape.in_features)) for shape in decoder.config.projections().values()) * 2
    tables = SMALL["vocab_size"] * SMALL["hidden_size"] * 2 * (1 if tied else 2)
    norms = 13 * SMALL["hidden_size"] * 2
    assert watch.peak["linears"] == largest
    assert watch.peak["all"] <= tables + largest + norms
    whole = sum(entry.stat().st_size for entry in folder.glob("*.safetensors"))
    assert watch.peak["all"] < whole / 4
    assert set(watch.counts.values()) == {1}, "a tensor was read twice"


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 64}),
    ],
)
def test_weight_bytes_are_the_bytes_held(
    tmp_path: Path, backend_name: str, family: str, changes: dict[str, Any]
) -> None:
    folder = write_tiny(tmp_path, family, torch.bfloat16, **changes)
    decoder = decoder_of(opened(folder), backend_named(backend_name), 64)
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors_in(decoder)}
    # A backend may count small structs that point into its tensors.
    structs = 256 * (len(decoder.layers) * 4 + 2)
    assert sum(held.values()) <= decoder.weight_bytes <= sum(held.values()) + structs


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors reachable through dataclasses and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value):
        for entry in fields(value):
            yield from tensors_in(getattr(value, entry.name))


def test_linears_take_four_bits_and_their_scales(tmp_path: Path, backend_name: str) -> None:
    """Half a byte a weight and one float32 scale for 64 of them; no 16-bit copy hides behind a packed one."""
    decoder = decoder_of(
        opened(write_tiny(tmp_path, "llama", torch.bfloat16, tie_word_embeddings=True)), backend_named(backend_name), 64
    )
    shapes = decoder.config.projections().values()
    num_weights = sum(shape.out_features * shape.in_features for shape in shapes)
    for layer in decoder.layers:
        linears = sum(linear.nbytes for linear in (layer.qkv, layer.o, layer.gate_up, layer.down))
        assert linears <= num_weights * (0.5 + 4 / 64) + 4 * 256


def test_a_tied_head_is_the_embedding(tmp_path: Path, backend_name: str) -> None:
    def built(name: str, tied: bool) -> Decoder:
        folder = write_tiny(tmp_path / name, "llama", torch.bfloat16, tie_word_embeddings=tied)
        return decoder_of(opened(folder), backend_named(backend_name), 64)

    tied, untied = built("tied", True), built("untied", False)
    assert tied.lm_head is tied.embedding
    assert untied.weight_bytes - tied.weight_bytes == untied.lm_head.nbytes == untied.embedding.nbytes


def test_progress_is_told_after_every_layer(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    checkpoint = opened(write_tiny(tmp_path, "llama", torch.bfloat16, num_hidden_layers=3))
    build_decoder(checkpoint, backend_named("eager"), CPU, 16, lambda *counts: seen.append(counts))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(("asked", "rows"), [(None, 512), (40, 40)])
def test_rotary_tables_are_as_long_as_asked(tmp_path: Path, asked: int | None, rows: int) -> None:
    checkpoint = opened(write_tiny(tmp_path, "llama", torch.bfloat16))
    decoder = build_decoder(checkpoint, backend_named("eager"), CPU, asked)
    assert decoder.cos_XD.shape == decoder.sin_XD.shape == (rows, 16)


def test_a_damaged_weight_is_refused_by_name(tmp_path: Path) -> None:
    config = tiny_config("llama", **SMALL)
    weights = tiny_model(config)
    name = HfNames.linear(1, "down_proj")
    weights[name][5, 7] = float("inf")
    folder = write_hf(tmp_path, config, weights)
    with pytest.raises(UnsupportedModel, match=rf"{name}.*NaN or infinity"):
        decoder_of(opened(folder), backend_named("eager"), 16)

"""Damaged and hostile files of a base that fuzzers found: each ended in a Python error, or in memory for a billion
layers. Now each is refused by the name of what is wrong."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from perseid_server.errors import UnsupportedModel
from perseid_server.model.gguf_config import from_gguf
from perseid_server.model.headers.gguf import read_gguf_header
from perseid_server.model.headers.safetensors import read_hf_folder
from perseid_server.model.tokenizer import bundle_from_folder, bundle_from_gguf
from tests.fakes import byte_tokenizer
from tests.fuzz import gguf_bytes
from tests.fuzz.gguf_bytes import ARRAY, FLOAT32, INT32, STRING, UINT32, Key


def gguf(
    path: Path, model: str, changes: Mapping[str, tuple[int, object] | None], more: list[Key] | None = None
) -> Path:
    keys = [(name, *(changes.get(name) or (kind, value))) for name, kind, value in gguf_bytes.keys(model)]
    keys = [key for key in keys if changes.get(key[0], "") is not None]
    table = gguf_bytes.tensors()
    path.write_bytes(gguf_bytes.whole(gguf_bytes.header([*keys, *(more or [])], table), table))
    return path


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("bos_token_id", (FLOAT32, 1.0), "tokenizer.ggml.bos_token_id: expected an integer, got 1.0"),
        ("bos_token_id", (UINT32, 1 << 31), "expected a token of the 101 in the file, got 2147483648"),
        ("eos_token_id", (INT32, -1), "expected a token of the 101 in the file, got -1"),
        ("eos_token_id", (ARRAY, (STRING, ["a"])), "expected a"),
        ("merges", None, "tokenizer.ggml.merges: expected the merges"),
        ("merges", (ARRAY, (UINT32, [1])), "tokenizer.ggml.merges: expected a list of names"),
        ("merges", (ARRAY, (STRING, ["abc"])), "expected two pieces with a space between them, got 'abc'"),
        ("merges", (ARRAY, (STRING, ["a zz"])), "tokenizer.ggml.merges: the tokenizer cannot be made of it"),
        ("tokens", (ARRAY, (UINT32, [1, 2])), "tokenizer.ggml.tokens: expected a list of names"),
        ("tokens", (STRING, "abc"), "tokenizer.ggml.tokens: expected a list of names"),
        ("token_type", (FLOAT32, 2.0), "tokenizer.ggml.token_type: expected"),
    ],
)
def test_vocabularies(tmp_path: Path, name: str, value: tuple[int, object] | None, says: str) -> None:
    path = gguf(tmp_path / "a.gguf", "gpt2", {f"tokenizer.ggml.{name}": value})
    with pytest.raises(UnsupportedModel) as refused:
        bundle_from_gguf(read_gguf_header(path))
    assert says in refused.value.message


@pytest.mark.parametrize("scores", [None, (STRING, "abc"), (ARRAY, (FLOAT32, [1.0])), (ARRAY, (STRING, ["a"] * 101))])
def test_scores(tmp_path: Path, scores: tuple[int, object] | None) -> None:
    path = gguf(tmp_path / "a.gguf", "llama", {"tokenizer.ggml.scores": scores})
    with pytest.raises(UnsupportedModel, match=r"tokenizer.ggml.scores: expected a number for each of the 101 tokens"):
        bundle_from_gguf(read_gguf_header(path))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("general.alignment", (FLOAT32, 0.0), "general.alignment: expected a positive integer, got 0.0"),
        ("general.alignment", (UINT32, 0), "general.alignment: expected a positive integer, got 0"),
        ("split.count", (STRING, "two"), "split.count: expected an integer, got 'two'"),
        ("general.name", (STRING, "again"), "the key 'general.name' appears twice"),
    ],
)
def test_gguf_headers(tmp_path: Path, name: str, value: tuple[int, object], says: str) -> None:
    changes = {} if name == "general.name" else {name: None}
    path = gguf(tmp_path / "a.gguf", "gpt2", changes, [(name, *value)])
    with pytest.raises(UnsupportedModel) as refused:
        read_gguf_header(path)
    assert says in refused.value.message


def test_arrays_without_end(tmp_path: Path) -> None:
    """Each says that it holds one array."""
    level = b"\x09\0\0\0" + (1).to_bytes(8, "little")
    raw = gguf_bytes.header([], [], 0, 1) + (1).to_bytes(8, "little") + b"a" + b"\x09\0\0\0" + level * 5000
    (tmp_path / "a.gguf").write_bytes(raw)
    with pytest.raises(UnsupportedModel, match="damaged or cut short"):
        read_gguf_header(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    "table",
    [
        [("a", [4], 0, 0), ("a", [4], 0, 32)],
        [("a", [1] * 60, 0, 0)],
        [("a", [1 << 63, 1 << 63], 0, 0)],
        [("a", [4], 0, (1 << 64) - 1)],
    ],
    ids=["twice", "dimensions", "huge", "beyond"],
)
def test_tables_of_tensors(tmp_path: Path, table: list[gguf_bytes.Tensor]) -> None:
    raw = gguf_bytes.header(gguf_bytes.keys("gpt2"), table)
    (tmp_path / "a.gguf").write_bytes(gguf_bytes.whole(raw, gguf_bytes.tensors()))
    with pytest.raises(UnsupportedModel):
        read_gguf_header(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("block_count", (UINT32, 1 << 31), "2147483648 layers; expected at most 4096"),
        ("rope.freq_base", (STRING, "fast"), "llama.rope.freq_base: expected a finite number, got 'fast'"),
        ("attention.layer_norm_rms_epsilon", (ARRAY, (UINT32, [1])), "expected a finite number, got [1]"),
    ],
)
def test_shapes(tmp_path: Path, name: str, value: tuple[int, object], says: str) -> None:
    path = gguf(tmp_path / "a.gguf", "gpt2", {f"llama.{name}": value})
    with pytest.raises(UnsupportedModel) as refused:
        from_gguf(read_gguf_header(path))
    assert says in refused.value.message


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("tokenizer.json", "{", "tokenizer.json: the tokenizer cannot be made of it"),
        ("tokenizer.json", '{"model": 3}', "tokenizer.json: the tokenizer cannot be made of it"),
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token: expected a text, got 3"),
        ("tokenizer_config.json", '{"eos_token": "\\ud800"}', "eos_token: expected a text"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template: expected a text, got 3"),
        ("tokenizer_config.json", "[" * 100_000, "tokenizer_config.json is not valid JSON"),
    ],
)
def test_tokenizer_files(tmp_path: Path, file: str, content: str, says: str) -> None:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / file).write_text(content)
    with pytest.raises(UnsupportedModel) as refused:
        bundle_from_folder(tmp_path)
    assert says in refused.value.message


@pytest.mark.parametrize("stated", [[{}], [3], [{"name": "other"}], [{"name": "default"}]], ids=str)
def test_lists_without_a_usual_template(tmp_path: Path, stated: list[object]) -> None:
    """They are taken for none."""
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": stated, "eos_token": {}}))
    assert bundle_from_folder(tmp_path).chat_template is None


@pytest.mark.parametrize(
    "names", [[["a"]], ["x" * 5000], ["../a"], ["\0"], [3]], ids=["list", "long", "above", "nul", "number"]
)
def test_index_files(tmp_path: Path, names: list[object]) -> None:
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {str(place): name for place, name in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedModel, match=r"model.safetensors.index.json"):
        read_hf_folder(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": {}, "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4.0]},
        {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
    ],
    ids=str,
)
def test_safetensors_headers(tmp_path: Path, entry: dict[str, object]) -> None:
    (tmp_path / "config.json").write_text("{}")
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UnsupportedModel, match="header is damaged"):
        read_hf_folder(tmp_path)


def test_tensors_that_share_bytes(tmp_path: Path) -> None:
    """`perseid inspect` took such a file, and loading it failed."""
    (tmp_path / "config.json").write_text("{}")
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UnsupportedModel, match="tensor 'b' overlaps another one"):
        read_hf_folder(tmp_path)

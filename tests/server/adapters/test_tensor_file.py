"""A safetensors file is read exactly or refused cleanly, whatever its bytes are."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from perseid_server.adapters.lora import WEIGHTS_FILE, check_adapter
from perseid_server.adapters.tensor_file import MAX_HEADER_BYTES, MAX_TENSORS, TensorFile
from perseid_server.errors import AdapterRejected
from tests.fakes import tiny_spec
from tests.server.adapters.folders import write_adapter

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
Header = dict[str, object]


def encoded(header: object, data: bytes = bytes(8), *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(**changes: object) -> Header:
    return {"x": F32 | changes}


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "less than a length": (b"abc", "3 bytes"),
    "length only": (struct.pack("<Q", 5), "announces a header of 5 bytes"),
    "a header longer than the file": (encoded({"x": F32}, length=10_000), "announces a header of 10000 bytes"),
    "a header of 2**64 - 1 bytes": (
        encoded({"x": F32}, length=2**64 - 1),
        "announces a header of 18446744073709551615",
    ),
    "a header shorter than its JSON": (encoded({"x": F32}, length=20), "header is damaged"),
    "no header": (encoded(b""), "header is damaged"),
    "a header that is no UTF-8": (encoded(b'{"\xff": 1}'), "utf-8"),
    "a header that is no object": (encoded([F32]), "not an object"),
    "a header nested deeply": (encoded(b"[" * 50_000), "nested too deeply"),
    "lists by the million": (encoded(b'{"__metadata__":[' + b"[]," * 1_000_000 + b"[]]}"), "more lists or objects"),
    "objects by the million": (encoded(b'{"__metadata__":[' + b"{}," * 1_000_000 + b"{}]}"), "more lists or objects"),
    "a pickle": (b"\x80\x04\x95" + bytes(64), "not a safetensors file"),
    "a tensor twice": (encoded(b'{"x": %b, "x": %b}' % ((json.dumps(F32).encode(),) * 2)), "'x' appears twice"),
    "half a character": (encoded(rb'{"\ud800": {}}'), "surrogates"),
    "a long name": (encoded({"x" * 300: F32}), "300 characters"),
    "an entry that is no object": (encoded({"x": 3}), "exactly dtype, shape and data_offsets"),
    "an entry without offsets": (encoded({"x": {"dtype": "F32", "shape": [2]}}), "exactly"),
    "an entry with more": (encoded(entry(extra=1)), "exactly"),
    "an unknown type": (encoded(entry(dtype="F99")), "type 'F99'"),
    "an integer type": (encoded(entry(dtype="I64", shape=[1])), "type 'I64'"),
    "a type that is no text": (encoded(entry(dtype=["F32"])), "type ['F32']"),
    "a type of another width": (encoded(entry(dtype="F16")), "takes 8 bytes where F16 [2] needs 4"),
    "a shape that is no list": (encoded(entry(shape=2)), "the shape 2"),
    "a negative size": (encoded(entry(shape=[-2])), "the shape [-2]"),
    "a fractional size": (encoded(entry(shape=[2.0])), "the shape [2.0]"),
    "a size that is true": (encoded(entry(shape=[True, 2])), "the shape [True, 2]"),
    "nine dimensions": (encoded(entry(shape=[1] * 8 + [2])), "at most 8"),
    "an enormous shape": (encoded(entry(shape=[2**47, 2**47])), "no file could hold it"),
    "an enormous shape of nothing": (encoded(entry(shape=[0, 2**47, 2**47], data_offsets=[0, 0])), "no file could"),
    "a shape that overflows to what it has": (encoded(entry(shape=[2**32, 2**32, 2])), "no file could hold it"),
    "a shape whose bytes overflow": (encoded(entry(shape=[2**47, 2])), "no file could hold it"),
    "offsets that are no pair": (encoded(entry(data_offsets=[0, 4, 8])), "data_offsets"),
    "a negative offset": (encoded(entry(data_offsets=[-8, 0])), "data_offsets [-8, 0]"),
    "offsets backwards": (encoded(entry(data_offsets=[8, 0])), "data_offsets [8, 0]"),
    "offsets beyond the file": (encoded(entry(data_offsets=[0, 8]), bytes(4)), "cut short"),
    "offsets far beyond the file": (encoded(entry(data_offsets=[2**47, 2**47 + 8])), "gap"),
    "a shape that takes other bytes": (encoded(entry(shape=[3])), "takes 8 bytes where F32 [3] needs 12"),
    "an overlap": (encoded({"x": F32, "y": F32 | {"data_offsets": [4, 12]}}, bytes(12)), "'y' overlaps"),
    "the same bytes twice": (encoded({"x": F32, "y": F32}), "overlaps"),
    "a gap": (encoded({"x": F32, "y": F32 | {"data_offsets": [16, 24]}}, bytes(24)), "'y' leaves a gap"),
    "bytes before the first tensor": (encoded(entry(data_offsets=[8, 16]), bytes(16)), "gap"),
    "bytes after the last tensor": (encoded({"x": F32}, bytes(9)), "cut short or damaged"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused(case, tmp_path):
    raw, words = BAD_FILES[case]
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(raw)
    with pytest.raises(AdapterRejected) as caught:
        TensorFile.open(path)
    assert words in caught.value.message
    assert len(caught.value.message) < 1000


def test_a_header_beyond_the_limit_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / WEIGHTS_FILE
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        file.truncate(MAX_HEADER_BYTES + 100)  # sparse
    with pytest.raises(AdapterRejected, match=f"has a header of {MAX_HEADER_BYTES + 1} bytes: expected at most"):
        TensorFile.open(path)


def test_a_duplicate_among_very_many_keys_is_found_at_once(tmp_path):
    """Looking each key up in a list would take hours."""
    keys = b",".join(b'"%d":0' % number for number in range(300_000))
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(encoded(b"{" + keys + b',"299999":0}'))
    with pytest.raises(AdapterRejected, match="'299999' appears twice"):
        TensorFile.open(path)


def test_too_many_tensors_are_refused(tmp_path):
    keys = b",".join(b'"%d":0' % number for number in range(MAX_TENSORS + 1))
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(encoded(b"{" + keys + b"}"))
    told = f"{WEIGHTS_FILE} lists {MAX_TENSORS + 1} tensors: expected at most {MAX_TENSORS} .* MoE"
    with pytest.raises(AdapterRejected, match=told):
        TensorFile.open(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_are_read_exactly(dtype, tmp_path):
    torch.manual_seed(0)
    tensors = {"a": torch.randn(3, 5).to(dtype), "b": torch.randn(2, 0).to(dtype), "c": torch.randn(7).to(dtype)}
    save_file(tensors, tmp_path / WEIGHTS_FILE, metadata={"format": "pt"})
    file = TensorFile.open(tmp_path / WEIGHTS_FILE)
    assert set(file.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert np.array_equal(file.read(name), tensor.float().numpy()), name


def test_a_file_that_changes_after_it_was_opened_is_refused(tmp_path):
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(encoded({"x": F32}))
    file = TensorFile.open(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(AdapterRejected, match="cut short"):
        file.read("x")
    path.unlink()
    with pytest.raises(AdapterRejected, match="cannot be read"):
        file.read("x")


def test_brackets_within_texts_are_not_counted(tmp_path):
    """A training log, for instance, with escaped quotes in it."""
    log = json.dumps([["a", {}]] * 90_000)
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(encoded({"__metadata__": {"log": log}, "x": F32}))
    assert set(TensorFile.open(path).tensors) == {"x"}


@pytest.mark.parametrize("text", [b'"' + b"\\" * 1_000_001, b'"' + b'\\"' * 1_000_000], ids=["backslashes", "quotes"])
def test_a_text_without_an_end_is_read_once(text: bytes, tmp_path):
    """In time that grows with its length, not with its square."""
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(encoded(b"[" * (4 * MAX_TENSORS + 1) + text))
    with pytest.raises(AdapterRejected, match="more lists or objects"):
        TensorFile.open(path)


# --- damage at random -----------------------------------------------------------------------------------------------


def flipped(raw: bytes, random: np.random.Generator) -> bytes:
    """One bit changed, most often in the header."""
    header_end = 8 + struct.unpack("<Q", raw[:8])[0]
    end = header_end if random.random() < 0.8 else len(raw)
    damaged = bytearray(raw)
    damaged[random.integers(end)] ^= 1 << int(random.integers(8))
    return bytes(damaged)


def cut(raw: bytes, random: np.random.Generator) -> bytes:
    return raw[: random.integers(len(raw))]


def overwritten(raw: bytes, random: np.random.Generator) -> bytes:
    at = int(random.integers(len(raw) - 16))
    return raw[:at] + random.bytes(16) + raw[at + 16 :]


def with_another_number(raw: bytes, random: np.random.Generator) -> bytes:
    """A digit of the header becomes another one."""
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    digits = [at for at in range(8, end) if chr(raw[at]).isdigit()]
    at = int(random.choice(digits))
    return raw[:at] + b"%d" % random.integers(10) + raw[at + 1 :]


def is_clean(folder: Path) -> bool:
    """Whether the adapter loads; any other error than a refusal fails the test."""
    try:
        check_adapter(folder, tiny_spec())
    except AdapterRejected:
        return False
    return True


@pytest.mark.parametrize("damage", [flipped, cut, overwritten, with_another_number])
def test_random_damage_is_refused_or_loads(damage: Callable[[bytes, np.random.Generator], bytes], tmp_path):
    folder = write_adapter(tmp_path)
    path = folder / WEIGHTS_FILE
    raw = path.read_bytes()
    random = np.random.default_rng(7)
    outcomes = []
    for _ in range(200):
        path.write_bytes(damage(raw, random))
        outcomes.append(is_clean(folder))
    assert not all(outcomes), "damage must be noticed at least sometimes"
    assert damage is not cut or not any(outcomes), "a file that is cut short never loads"

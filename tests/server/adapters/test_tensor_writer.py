"""What is written piece by piece has the bytes that safetensors writes at once: an adapter's version is their hash."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from perseid_server.adapters.tensor_writer import append_tensors, begin_tensors

NAMES = [f"layers.{layer}.{part}.weight" for layer in (1, 2, 10) for part in ("lora_B", "lora_A")]


@pytest.mark.parametrize("count", range(1, len(NAMES) + 1))
def test_the_file_is_safetensors_own(tmp_path: Path, count: int) -> None:
    random = np.random.default_rng(count)
    tensors = {name: random.normal(size=(3, count + index)).astype("f4") for index, name in enumerate(NAMES[:count])}
    begin_tensors(tmp_path / "ours", {name: tensor.shape for name, tensor in tensors.items()})
    for name in sorted(tensors):
        append_tensors(tmp_path / "ours", tensors[name])
    save_file(tensors, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_slices_are_written_as_they_are_read(tmp_path: Path) -> None:
    matrix = np.arange(12, dtype="f4").reshape(3, 4)
    begin_tensors(tmp_path / "ours", {"a": (3, 2), "b": (2, 3)})
    append_tensors(tmp_path / "ours", matrix[:, 1:3], matrix.T[2:])
    save_file({"a": matrix[:, 1:3].copy(), "b": matrix.T[2:].copy()}, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()

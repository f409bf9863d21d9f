"""The headers of a Hugging Face folder: `config.json`, the safetensors index, and each file's table of tensors."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from perseid_server.errors import UnsupportedModel
from perseid_server.model.config_fields import section

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_NAME = 200
_BITS: Mapping[str, int] = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "U8": 8, "I8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8,
}  # fmt: skip
"""Of one element; other types are the library's business."""
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class SafeTensor:
    """One tensor of one file."""

    name: str
    dtype: str  # "BF16", "F32", "U8" …
    shape: tuple[int, ...]
    file: Path
    nbytes: int

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class HfFolder:
    """A checkpoint folder: its config and all its tensors, whichever file they lie in."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, SafeTensor]
    files: tuple[Path, ...]  # the data files, sorted by name

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """The config's `quantization_config`."""
        return section(self.config, "quantization_config") or None


def read_hf_folder(path: Path) -> HfFolder:
    """Read the config and all headers. UnsupportedModel names a missing or damaged file."""
    config = read_json(path / "config.json")
    files = _data_files(path)
    tensors: dict[str, SafeTensor] = {}
    for file in files:
        for tensor in read_safetensors_header(file):
            if tensor.name in tensors:
                raise UnsupportedModel(
                    f"tensor {tensor.name!r} is in {tensors[tensor.name].file.name} and in {file.name}"
                )
            tensors[tensor.name] = tensor
    return HfFolder(path, config, tensors, files)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    if not path.is_file():
        raise UnsupportedModel(f"{path.parent} has no {path.name}")
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UnsupportedModel(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UnsupportedModel(f"{path.name}: expected an object, got {type(content).__name__}")
    return content


def read_safetensors_header(path: Path) -> list[SafeTensor]:
    """The table of tensors of one file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise UnsupportedModel(f"{path.name} is not a safetensors file, or it is cut short")
        raw = file.read(length)
    try:
        table = json.loads(raw)
        tensors = [_tensor(path, name, entry) for name, entry in table.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UnsupportedModel(f"{path.name}: the safetensors header is damaged ({error})") from error
    end = 0
    for begin, tensor in sorted(tensors, key=lambda one: (one[0], one[1].nbytes)):
        if begin != end:
            raise UnsupportedModel(f"{path.name}: tensor {tensor.name!r} overlaps another one or leaves a gap")
        end += tensor.nbytes
    if 8 + length + end != size:
        raise UnsupportedModel(
            f"{path.name} has {size} bytes where its header describes {8 + length + end}; it is cut short or damaged"
        )
    return [tensor for _, tensor in tensors]


def _tensor(path: Path, name: str, entry: Mapping[str, Any]) -> tuple[int, SafeTensor]:
    """Where it begins in the data, and what it is."""
    begin, end = entry["data_offsets"]
    if not isinstance(entry["dtype"], str) or not all(type(n) is int and n >= 0 for n in (begin, end, *entry["shape"])):
        raise ValueError(f"tensor {name!r} needs a type, a shape and offsets")
    bits = _BITS.get(entry["dtype"])
    if end < begin or (bits is not None and 8 * (end - begin) != prod(entry["shape"]) * bits):
        raise ValueError(f"tensor {name!r} takes {end - begin} bytes, which is not what its type and shape need")
    return begin, SafeTensor(name, entry["dtype"], tuple(entry["shape"]), path, end - begin)


def _data_files(path: Path) -> tuple[Path, ...]:
    if (path / _INDEX).is_file():
        stated = section(read_json(path / _INDEX), "weight_map").values()
        if any(not isinstance(name, str) or Path(name).name != name or len(name) > _MAX_NAME for name in stated):
            raise UnsupportedModel(f"{_INDEX}: weight_map must name files beside it")
        names = set(stated)
        missing = sorted(name for name in names if not (path / name).is_file())
        if missing:
            raise UnsupportedModel(f"{_INDEX} names {missing[0]}, which is not in {path}")
        return tuple(path / name for name in sorted(names))
    single = path / "model.safetensors"
    files = (single,) if single.is_file() else tuple(sorted(path.glob("model*.safetensors")))
    if len(files) == 1:
        return files
    if files:
        raise UnsupportedModel(f"{path} has {len(files)} model*.safetensors files but no {_INDEX}")
    others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
    hint = f"; {others[0]} is not read, because such files can run code: convert it to safetensors" if others else ""
    raise UnsupportedModel(f"{path} has no model.safetensors{hint}")

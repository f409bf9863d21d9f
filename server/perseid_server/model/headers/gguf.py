"""The header of a GGUF file: metadata and the table of tensors.

A reader of our own, because the `gguf` package spends seconds building an object for each of 50,000 vocabulary
entries, and because the engine must open a GGUF without that package. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from perseid_server.errors import UnsupportedModel, quoted
from perseid_server.model.config_fields import integer, positive_int

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 8  # the format knows four
_STRING, _ARRAY = 8, 9
_SCALARS: Mapping[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgmlType:
    """How a tensor's elements are stored: `block` elements in `nbytes` bytes."""

    name: str
    block: int
    nbytes: int


GGML_TYPES: Mapping[int, GgmlType] = {
    0: GgmlType("F32", 1, 4),
    1: GgmlType("F16", 1, 2),
    2: GgmlType("Q4_0", 32, 18),
    3: GgmlType("Q4_1", 32, 20),
    6: GgmlType("Q5_0", 32, 22),
    7: GgmlType("Q5_1", 32, 24),
    8: GgmlType("Q8_0", 32, 34),
    9: GgmlType("Q8_1", 32, 40),
    10: GgmlType("Q2_K", 256, 84),
    11: GgmlType("Q3_K", 256, 110),
    12: GgmlType("Q4_K", 256, 144),
    13: GgmlType("Q5_K", 256, 176),
    14: GgmlType("Q6_K", 256, 210),
    15: GgmlType("Q8_K", 256, 292),
    16: GgmlType("IQ2_XXS", 256, 66),
    17: GgmlType("IQ2_XS", 256, 74),
    18: GgmlType("IQ3_XXS", 256, 98),
    19: GgmlType("IQ1_S", 256, 50),
    20: GgmlType("IQ4_NL", 32, 18),
    21: GgmlType("IQ3_S", 256, 110),
    22: GgmlType("IQ2_S", 256, 82),
    23: GgmlType("IQ4_XS", 256, 136),
    24: GgmlType("I8", 1, 1),
    25: GgmlType("I16", 1, 2),
    26: GgmlType("I32", 1, 4),
    27: GgmlType("I64", 1, 8),
    28: GgmlType("F64", 1, 8),
    29: GgmlType("IQ1_M", 256, 56),
    30: GgmlType("BF16", 1, 2),
    34: GgmlType("TQ1_0", 256, 54),
    35: GgmlType("TQ2_0", 256, 66),
    39: GgmlType("MXFP4", 32, 17),
    40: GgmlType("NVFP4", 64, 36),
    41: GgmlType("Q1_0", 128, 18),
}
"""Element types by their number in the file; those the decoder cannot use are listed so that they can be named."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One entry of the tensor table."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]  # row-major, as numpy and torch write it: [out, in]
    offset: int  # bytes from the start of the file

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.num_elements // self.type.block * self.type.nbytes


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """All that a GGUF file holds beside tensor data."""

    path: Path
    metadata: Mapping[str, Any]  # key → number, bool, str or list of them
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture, "llama" or "qwen2" for example."""
        return str(self.metadata.get("general.architecture", "unnamed"))

    def get(self, key: str, default: Any = None) -> Any:
        """Metadata under the architecture's prefix: `get("block_count")` reads "llama.block_count"."""
        return self.metadata.get(f"{self.architecture}.{key}", default)


def read_gguf_header(path: Path) -> GgufHeader:
    """Parse the header. UnsupportedModel when the file is no GGUF, is damaged, or is one part of several."""
    with path.open("rb") as file:
        if file.read(4) != _MAGIC:
            raise UnsupportedModel(f"{path.name} is not a GGUF file: it does not begin with 'GGUF'")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header = _parse(path, data)
            except (struct.error, UnicodeDecodeError, IndexError, RecursionError) as error:
                raise UnsupportedModel(f"{path.name}: the GGUF header is damaged or cut short ({error})") from error
            _check_bounds(header, len(data))
    return header


def _parse(path: Path, data: mmap.mmap) -> GgufHeader:
    cursor = _Cursor(data, len(_MAGIC))
    version = cursor.scalar("I")
    if version not in _VERSIONS:
        raise UnsupportedModel(
            f"{path.name}: GGUF version {version} is not supported; expected little-endian version 2 or 3"
        )
    num_tensors, num_keys = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {}
    for _ in range(num_keys):
        key = cursor.string()
        if key in metadata:
            raise IndexError(f"the key {quoted(key)} appears twice")
        metadata[key] = cursor.value(cursor.scalar("I"))
    entries = [_entry(cursor, path) for _ in range(num_tensors)]
    if integer(metadata, "split.count", 1) > 1:
        raise UnsupportedModel(
            f"{path.name} is one of {metadata['split.count']} parts; join them with llama-gguf-split --merge"
        )
    alignment = positive_int(metadata, "general.alignment", _DEFAULT_ALIGNMENT)
    start = -(-cursor.position // alignment) * alignment
    tensors = {name: GgufTensor(name, type_, shape, start + offset) for name, type_, shape, offset in entries}
    if len(tensors) != len(entries):
        raise IndexError("two tensors have the same name")
    return GgufHeader(path, metadata, tensors)


def _entry(cursor: "_Cursor", path: Path) -> tuple[str, GgmlType, tuple[int, ...], int]:
    name = cursor.string()
    count = cursor.scalar("I")
    if count > _MAX_DIMENSIONS:
        raise IndexError(f"tensor {quoted(name)} has {count} dimensions")
    dimensions = [cursor.scalar("Q") for _ in range(count)]
    number = cursor.scalar("I")
    if number not in GGML_TYPES:
        raise UnsupportedModel(f"{path.name}: tensor {name!r} has the unknown type number {number}")
    return name, GGML_TYPES[number], tuple(reversed(dimensions)), cursor.scalar("Q")


def _check_bounds(header: GgufHeader, size: int) -> None:
    for tensor in header.tensors.values():
        if tensor.shape and tensor.shape[-1] % tensor.type.block:
            raise UnsupportedModel(
                f"{header.path.name}: rows of {tensor.name!r} have {tensor.shape[-1]} elements, not a multiple of "
                f"{tensor.type.name}'s block of {tensor.type.block}"
            )
        if tensor.offset + tensor.nbytes > size:
            raise UnsupportedModel(
                f"{header.path.name}: tensor {tensor.name!r} ends at byte {tensor.offset + tensor.nbytes} of a file "
                f"of {size} bytes; the file is cut short"
            )


class _Cursor:
    """Reads little-endian values one after another."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self._data = data
        self.position = position

    def scalar(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self._data, self.position)[0]
        self.position += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        end = self.position + length
        if end > len(self._data):
            raise IndexError(f"a string of {length} bytes at byte {self.position}")
        text = self._data[self.position : end].decode("utf-8")
        self.position = end
        return text

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(self.scalar("I"), self.scalar("Q"))
        if kind not in _SCALARS:
            raise IndexError(f"a value of the unknown type number {kind} at byte {self.position}")
        return self.scalar(_SCALARS[kind])

    def array(self, kind: int, count: int) -> list[Any]:
        if kind not in _SCALARS:
            return [self.value(kind) for _ in range(count)]
        layout = f"<{count}{_SCALARS[kind]}"
        if self.position + struct.calcsize(layout) > len(self._data):
            raise IndexError(f"an array of {count} values at byte {self.position}")
        values = list(struct.unpack_from(layout, self._data, self.position))
        self.position += struct.calcsize(layout)
        return values

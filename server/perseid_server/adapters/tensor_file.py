"""Reading an adapter's safetensors file as data that may be hostile. NumPy only.

Everything is checked against the file's real size before anything is allocated; tensors are read one at a time.
Format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, then the tensors).
"""

import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from perseid_server.adapters.untrusted import open_regular, parse_json, unreadable
from perseid_server.errors import AdapterRejected, quoted

MAX_HEADER_BYTES = 4 << 20
MAX_TENSORS = 20_000
"""What is parsed holds up the other threads meanwhile. An adapter of 80 layers has 1,120 tensors, 200 KB of header."""
_MOST_BRACKETS = 4 * MAX_TENSORS  # of each kind; a tensor has two
_LIMITS = (
    f"expected at most {MAX_TENSORS} tensors, described in {MAX_HEADER_BYTES} bytes; experts of MoE models are not "
    "supported"
)
_TEXT = re.compile(rb'"(?:[^"\\]+|\\.?)*+"?', re.DOTALL)  # one that does not end goes to the end: read once
MAX_DIMENSIONS = 8
MAX_NAME = 256
_MAX_NUMBERS = 1 << 48
_STORED_AS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_INTEGERS: dict[str, np.dtype[Any]] = {"I32": np.dtype("<i4"), "I64": np.dtype("<i8")}
_ALL_TYPES = _STORED_AS | _INTEGERS


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies in its file."""

    name: str
    dtype: str  # a key of _STORED_AS, or of _INTEGERS where these are allowed
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A safetensors file whose header has been checked."""

    path: Path
    tensors: Mapping[str, TensorEntry]
    nbytes: int

    @staticmethod
    def open(path: Path, *, integers: bool = False) -> "TensorFile":
        """Read and check the header. AdapterRejected says what is wrong with it.

        `integers`: whether some tensors may hold whole numbers, for instance token ids.
        """
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                header_size = _header_size(path, file.read(8), size)
                raw = file.read(header_size)
        except OSError as error:
            raise unreadable(path.name, error) from error
        entries = _parse(path, raw, 8 + header_size, _ALL_TYPES if integers else _STORED_AS)
        _check_layout(path, entries, 8 + header_size, size)
        return TensorFile(path, {entry.name: entry for entry in entries}, size)

    def read(self, name: str) -> NDArray[np.float32]:
        """One tensor as float32. AdapterRejected when the file is gone or shorter since it was opened."""
        entry = self.tensors[name]
        if entry.dtype in _INTEGERS:
            raise AdapterRejected(f"{self.path.name}: tensor {name!r} holds integers; expected {', '.join(_STORED_AS)}")
        values = self._read(entry)
        if entry.dtype == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        widened: NDArray[np.float32] = values.astype(np.float32, copy=False)
        return widened.reshape(entry.shape)

    def read_integers(self, name: str) -> NDArray[np.int64]:
        """One tensor of whole numbers. AdapterRejected as for `read`."""
        entry = self.tensors[name]
        if entry.dtype not in _INTEGERS:
            raise AdapterRejected(
                f"{self.path.name}: tensor {name!r} has the type {entry.dtype}; expected {', '.join(_INTEGERS)}"
            )
        return self._read(entry).astype(np.int64, copy=False).reshape(entry.shape)

    def _read(self, entry: TensorEntry) -> NDArray[Any]:
        raw = bytearray(entry.nbytes)
        try:
            with open_regular(self.path) as file:  # np.fromfile would take an error of the disk for the file's end
                file.seek(entry.offset)
                nbytes = file.readinto(raw)
        except OSError as error:
            raise unreadable(self.path.name, error) from error
        if nbytes != entry.nbytes:
            raise AdapterRejected(f"{self.path.name}: tensor {entry.name!r} is cut short")
        return np.frombuffer(raw, _ALL_TYPES[entry.dtype])


def _header_size(path: Path, prefix: bytes, size: int) -> int:
    if len(prefix) < 8:
        raise AdapterRejected(f"{path.name} has {size} bytes; a safetensors file starts with 8 bytes of header length")
    length: int = struct.unpack("<Q", prefix)[0]
    if length > size - 8:
        raise AdapterRejected(
            f"{path.name} is not a safetensors file or is cut short: it announces a header of {length} bytes, and the "
            f"file has {size}"
        )
    if length > MAX_HEADER_BYTES:
        raise AdapterRejected(f"{path.name} has a header of {length} bytes: {_LIMITS}")
    return length


def _parse(path: Path, raw: bytes, data_start: int, types: Mapping[str, np.dtype[Any]]) -> list[TensorEntry]:
    def broken(why: str) -> NoReturn:
        raise AdapterRejected(f"{path.name}: the safetensors header is damaged: {why}")

    if _has_many_brackets(raw) and _has_many_brackets(_TEXT.sub(b"", raw)):  # nested or empty ones by the million
        raise AdapterRejected(f"{path.name} holds more lists or objects than its tensors may need: {_LIMITS}")
    try:
        header = parse_json(raw)
    except ValueError as error:
        broken(str(error))
    if not isinstance(header, dict):
        broken("it is not an object")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise AdapterRejected(f"{path.name} lists {len(header)} tensors: {_LIMITS}")
    return [_entry(path, name, value, data_start, types) for name, value in header.items()]


def _has_many_brackets(raw: bytes) -> bool:
    return max(raw.count(b"["), raw.count(b"{")) > _MOST_BRACKETS


def _entry(path: Path, name: str, value: Any, data_start: int, types: Mapping[str, np.dtype[Any]]) -> TensorEntry:
    def broken(why: str) -> NoReturn:
        raise AdapterRejected(f"{path.name}: tensor {quoted(name)} {why}")

    if len(name) > MAX_NAME:
        broken(f"has a name of {len(name)} characters; the limit is {MAX_NAME}")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        broken("needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in types:
        broken(f"has the type {quoted(dtype)}; expected one of {', '.join(types)}")
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        broken(f"has the shape {quoted(shape)}; expected at most {MAX_DIMENSIONS} non-negative integers")
    if prod(size for size in shape if size) >= _MAX_NUMBERS:  # a zero beside them, and no array could have it
        broken(f"has the shape {quoted(shape)}; no file could hold it")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        broken(f"has the data_offsets {quoted(offsets)}; expected [begin, end]")
    nbytes = offsets[1] - offsets[0]
    wanted = prod(shape) * types[dtype].itemsize
    if nbytes != wanted:
        broken(f"takes {nbytes} bytes where {dtype} {shape} needs {wanted}")
    return TensorEntry(name, dtype, tuple(shape), data_start + offsets[0], nbytes)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 48 for item in value)


def _check_layout(path: Path, entries: list[TensorEntry], data_start: int, size: int) -> None:
    """Tensors fill the file from the header to its end, without gaps and without sharing bytes."""
    position = data_start
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != position:
            kind = "overlaps another tensor" if entry.offset < position else "leaves a gap before it"
            raise AdapterRejected(f"{path.name}: tensor {entry.name!r} {kind}")
        position += entry.nbytes
    if position != size:
        raise AdapterRejected(
            f"{path.name} has {size} bytes where its header describes {position}; it is cut short or damaged"
        )

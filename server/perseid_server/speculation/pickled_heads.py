"""`medusa_lm_head.pt`, Medusa v1's file, made a safetensors file. NumPy only, no torch, no code of the file is run.

Such files are read only where the operator allows it (--allow-pickle-heads). The archive's sizes are held against the
file's before anything is read, and its parts must be stored as they are: nothing can unfold to more than was sent.
"""

import zipfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from perseid_server.adapters.untrusted import unreadable
from perseid_server.errors import AdapterRejected, quoted
from perseid_server.speculation.heads_config import TENSORS_FILE
from perseid_server.speculation.heads_folder import PICKLE_FILE
from perseid_server.speculation.heads_names import sort_names
from perseid_server.speculation.torch_pickle import ITEM_BYTES, StoredTensor, read_tensors

MAX_PICKLE_BYTES = 1 << 20
"""Of the description of the tensors, some 200 bytes each."""
MAX_TENSOR_BYTES = 8 << 30
"""Of all tensors together, which may share what they are stored in."""
_AS_STORED: Mapping[str, np.dtype[np.generic]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}


def unpickle_heads(folder: Path) -> None:
    """Put medusa_lm_head.safetensors in the place of medusa_lm_head.pt. AdapterRejected says what is wrong with it."""
    path = folder / PICKLE_FILE
    try:
        with zipfile.ZipFile(path) as archive:
            tensors = _Archive.of(archive, path.stat().st_size).tensors()
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, OverflowError) as error:
        raise AdapterRejected(
            f"{PICKLE_FILE} is damaged, or was saved by a torch before 1.6: expected a zip archive of tensors; save it "
            "again with torch.save, or as safetensors"
        ) from error
    except OSError as error:
        raise unreadable(PICKLE_FILE, error) from error
    save_file(tensors, folder / TENSORS_FILE)
    path.unlink()


@dataclass(frozen=True, slots=True)
class _Archive:
    """A zip archive whose parts are stored as they are, each under its name without the archive's own."""

    archive: zipfile.ZipFile
    parts: Mapping[str, zipfile.ZipInfo]
    nbytes: int

    @staticmethod
    def of(archive: zipfile.ZipFile, nbytes: int) -> "_Archive":
        parts: dict[str, zipfile.ZipInfo] = {}
        for part in archive.infolist():
            name = part.filename.partition("/")[2]
            if parts.setdefault(name, part) is not part:
                raise AdapterRejected(f"{PICKLE_FILE} has two parts {quoted(name)}")
            if part.compress_type != zipfile.ZIP_STORED or part.flag_bits & 1 or part.file_size != part.compress_size:
                raise AdapterRejected(f"{PICKLE_FILE}: its part {quoted(name)} is compressed or encrypted")
        if sum(part.file_size for part in parts.values()) > nbytes:
            raise AdapterRejected(f"{PICKLE_FILE} has {nbytes} bytes, and its parts claim more")
        return _Archive(archive, parts, nbytes)

    def tensors(self) -> dict[str, NDArray[np.generic]]:
        """All tensors by name, read when all of them are known to be those of heads."""
        description = self._part("data.pkl")
        if description.file_size > MAX_PICKLE_BYTES:
            raise AdapterRejected(
                f"{PICKLE_FILE} describes its tensors in {description.file_size} bytes; expected at most "
                f"{MAX_PICKLE_BYTES}"
            )
        if "byteorder" in self.parts and self._read("byteorder", 16) != b"little":
            raise AdapterRejected(f"{PICKLE_FILE} was not saved on a little-endian machine; save it again on one")
        found = read_tensors(self.archive.read(description))
        sort_names(found)
        self._check_sizes(found)
        by_storage: defaultdict[str, list[str]] = defaultdict(list)
        for name, tensor in sorted(found.items()):
            by_storage[tensor.storage.key].append(name)
        tensors: dict[str, NDArray[np.generic]] = {}
        for key, names in by_storage.items():  # a storage may be shared, and is held only while it is read
            raw = self.archive.read(self._part(f"data/{key}"))
            tensors |= {name: _values(raw, found[name]) for name in names}
        return tensors

    def _check_sizes(self, found: Mapping[str, StoredTensor]) -> None:
        for name, tensor in found.items():
            storage = tensor.storage
            stored, told = self._part(f"data/{storage.key}").file_size, storage.num_items * ITEM_BYTES[storage.dtype]
            if stored != told:
                raise AdapterRejected(f"{PICKLE_FILE}: tensor {quoted(name)} needs {told} bytes and has {stored}")
        storages = {tensor.storage.key: self._part(f"data/{tensor.storage.key}").file_size for tensor in found.values()}
        total = max(sum(prod(tensor.shape) * 4 for tensor in found.values()), sum(storages.values()))
        if total > MAX_TENSOR_BYTES:
            raise AdapterRejected(f"{PICKLE_FILE}: its tensors take {total} bytes; the limit is {MAX_TENSOR_BYTES}")

    def _read(self, name: str, limit: int) -> bytes:
        part = self._part(name)
        return self.archive.read(part) if part.file_size <= limit else b""

    def _part(self, name: str) -> zipfile.ZipInfo:
        part = self.parts.get(name)
        if part is None:
            raise AdapterRejected(f"{PICKLE_FILE} has no part {quoted(name)}; expected what torch.save writes")
        return part


def _values(raw: bytes, tensor: StoredTensor) -> NDArray[np.generic]:
    """A tensor's own numbers, without the rest of its storage."""
    stored = _AS_STORED[tensor.storage.dtype]
    values = np.frombuffer(raw, stored, prod(tensor.shape), tensor.offset * stored.itemsize).reshape(tensor.shape)
    if tensor.storage.dtype == "bfloat16":  # which NumPy does not have
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.copy()

"""Writing a safetensors file tensor by tensor. The shapes are known before the numbers are, so that a file never has to
be in memory, and its bytes are those that safetensors itself writes.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_ALIGNMENT = 8  # of the numbers in the file: the header is filled up with spaces


def begin_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A new file for float32 tensors of these shapes. They follow in the order of their names."""
    header, position = {}, 0
    for name in sorted(shapes):
        end = position + 4 * prod(shapes[name])
        header[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)


def append_tensors(path: Path, *tensors: NDArray[np.float32]) -> None:
    """The next ones. The file is not held open meanwhile: there may be hundreds."""
    with path.open("ab") as file:
        for tensor in tensors:
            file.write(np.ascontiguousarray(tensor, "<f4").data)

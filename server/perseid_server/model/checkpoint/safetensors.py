"""Tensors of a Hugging Face folder, copied one at a time from mapped files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from perseid_server.errors import UnsupportedModel
from perseid_server.model.headers.safetensors import HfFolder, SafeTensor


class TensorReader:
    """Reads tensors by name. Files stay mapped; the operating system keeps or drops their pages."""

    def __init__(self, folder: HfFolder) -> None:
        self.tensors: Mapping[str, SafeTensor] = folder.tensors
        self._open: dict[Path, Any] = {}

    def read(self, name: str) -> Tensor:
        """A copy of the tensor, on the CPU: a mapped one would change with its file while the base is served.

        UnsupportedModel names a file that is damaged, or no longer there.
        """
        file = self.tensors[name].file
        try:
            if file not in self._open:
                self._open[file] = safe_open(file, framework="pt")
            mapped: Tensor = self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UnsupportedModel(f"{file.name} cannot be read: {error}", field=name) from error
        return mapped.clone()

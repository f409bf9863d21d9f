"""From a folder of the store to heads on the device. Runs on a loader's thread."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from perseid_kernels.backend import Backend
from perseid_kernels.weights import take_rows
from perseid_server.adapters.gate_loading import VERSION_LENGTH
from perseid_server.adapters.store import version_of
from perseid_server.errors import AdapterRejected
from perseid_server.model.checkpoint import Checkpoint
from perseid_server.speculation.device_heads import DeviceHeads, place_heads
from perseid_server.speculation.heads_file import check_heads


@dataclass(frozen=True, slots=True)
class LoadHeads:
    """Loads heads for one base."""

    checkpoint: Checkpoint
    lm_head: Any  # the base's, in the backend's layout
    backend: Backend
    device: torch.device

    def __call__(self, folder: Path) -> DeviceHeads:
        """AdapterRejected where the files are not what they were when they were checked."""
        if len(folder.name) == VERSION_LENGTH and version_of(folder) != folder.name:
            raise AdapterRejected("their files have changed since they were loaded; load them again")
        spec = self.checkpoint.spec
        heads = place_heads(check_heads(folder, spec), self.backend, self.device, self._pack_lm_head)
        heads.propose(torch.zeros((1, spec.hidden_size), dtype=self.backend.compute_dtype, device=self.device))  # warm
        return heads

    def _pack_lm_head(self, rows: tuple[int, ...] | None) -> Any:
        if rows is None:
            return self.lm_head
        head = self.checkpoint.lm_head()
        whole = self.checkpoint.embedding() if head is None else head
        return self.backend.pack_draft(take_rows(whole, torch.tensor(rows)), self.device)

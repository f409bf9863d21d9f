"""Small host arrays to the device: many of them in one copy, and none that waits.

A copy from ordinary memory to a GPU returns only when all work before it on the stream is done; one from page-locked
memory is queued like a kernel. A step needs a dozen small arrays, so they go side by side in one page-locked buffer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes: Triton compiles a kernel once for such pointers and once more for others


@dataclass(frozen=True, slots=True)
class Layout:
    """Arrays of (dtype, shape) one after the other in a buffer of bytes."""

    fields: tuple[tuple[torch.dtype, tuple[int, ...]], ...]

    @staticmethod
    def of(arrays: Sequence[Tensor]) -> "Layout":
        """The layout that holds these."""
        return Layout(tuple((array.dtype, tuple(array.shape)) for array in arrays))

    @property
    def offsets(self) -> tuple[int, ...]:
        """First byte of each field, and the end of the last."""
        starts = [0]
        for dtype, shape in self.fields:
            starts.append(starts[-1] + -(-prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT)
        return tuple(starts)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self.offsets[-1]

    def views(self, buffer: Tensor) -> tuple[Tensor, ...]:
        """The fields as tensors that share the memory of `buffer`, uint8 [≥ nbytes]."""
        return tuple(
            buffer[start : start + prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for start, (dtype, shape) in zip(self.offsets, self.fields, strict=False)
        )


def staging(nbytes: int, device: torch.device) -> Tensor:
    """A host buffer, uint8 [nbytes], from which a copy to `device` does not wait.

    Take a new one for every copy: torch gives its memory out again only when the copies from it are done.
    """
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def upload(arrays: Sequence[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """The host tensors on `device`: by one copy that does not wait; on the CPU they are there already."""
    return tuple(arrays) if device.type == "cpu" else upload_packed(arrays, device)


def upload_packed(arrays: Sequence[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """`upload`'s way to a GPU, on any device."""
    layout = Layout.of(arrays)
    host = staging(layout.nbytes, device)
    for view, array in zip(layout.views(host), arrays, strict=True):
        view.copy_(array)
    return layout.views(host.to(device, non_blocking=True))

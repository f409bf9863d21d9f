"""The rank pool: adapter pages on the device, one pair of tensors for each fused linear of each layer.

    A [P, PAGE_RANK · slices, d_in]      B [P, PAGE_RANK, d_out]

A page number means the same in every layer, so an adapter is a short list of numbers. Pages are written by a loader
thread while the step loop reads others; a page is written only while nobody holds it.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from perseid_kernels.segments import PAGE_RANK
from perseid_server.adapters.lora import LoweredLinear
from perseid_server.model.spec import FUSED_LINEARS, BaseSpec


class AdapterPool:
    """`num_pages` pages on `device`, zero at first. Allocation is not thread-safe; `write` may run beside reads."""

    def __init__(self, spec: BaseSpec, num_pages: int, device: torch.device, dtype: torch.dtype) -> None:
        self.num_pages = num_pages
        self.a: tuple[dict[str, Tensor], ...] = tuple(
            {
                fused: torch.zeros(
                    (num_pages, PAGE_RANK * len(parts), spec.fused_shape(fused).in_features), dtype=dtype, device=device
                )
                for fused, parts in FUSED_LINEARS.items()
            }
            for _ in range(spec.num_layers)
        )
        self.b: tuple[dict[str, Tensor], ...] = tuple(
            {
                fused: torch.zeros(
                    (num_pages, PAGE_RANK, spec.fused_shape(fused).out_features), dtype=dtype, device=device
                )
                for fused in FUSED_LINEARS
            }
            for _ in range(spec.num_layers)
        )
        self._free = list(range(num_pages))
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @staticmethod
    def bytes_per_page(spec: BaseSpec, dtype: torch.dtype) -> int:
        """Device bytes of one page over all layers."""
        per_layer = sum(
            PAGE_RANK * (len(parts) * spec.fused_shape(fused).in_features + spec.fused_shape(fused).out_features)
            for fused, parts in FUSED_LINEARS.items()
        )
        return per_layer * spec.num_layers * dtype.itemsize

    @property
    def num_free(self) -> int:
        """Pages that hold no adapter."""
        return len(self._free)

    def allocate(self, count: int) -> tuple[int, ...] | None:
        """Pages for an adapter; None, and nothing taken, when there are too few."""
        if count > len(self._free):
            return None
        taken = tuple(self._free[:count])
        del self._free[:count]
        return taken

    def free(self, pages: Iterable[int]) -> None:
        """Give pages back. What they hold stays until they are written again; nobody may read it."""
        self._free.extend(pages)

    def write(self, pages: Sequence[int], linears: Iterable[LoweredLinear]) -> None:
        """Copy an adapter into its pages, zeros where it adapts nothing. Returns when the copy is complete."""
        index = torch.tensor(pages)
        by_site = {(linear.layer, linear.fused): linear for linear in linears}
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            for layer, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
                for fused in FUSED_LINEARS:
                    linear = by_site.get((layer, fused))
                    _put(a[fused], index, None if linear is None else torch.from_numpy(linear.a))
                    _put(b[fused], index, None if linear is None else torch.from_numpy(linear.b))
        if self._stream is not None:
            self._stream.synchronize()  # blocks the loader thread only


def _put(pool: Tensor, index: Tensor, values: Tensor | None) -> None:
    """pool[index] = values (or 0), a page at a time: short copies leave the memory bus to the step loop."""
    for position, page in enumerate(index.tolist()):
        if values is None:
            pool[page].zero_()
        else:
            pool[page].copy_(values[position])

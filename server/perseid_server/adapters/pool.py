"""The rank pool: adapter pages on the device, a `RankPages` for each fused linear of each layer.

A page number means the same in every layer, and for the first blocks of Medusa heads, so an adapter is a short list of
numbers. Pages are written by a loader thread while the step loop reads others; a page is written only while nobody
holds it.
"""

from collections.abc import Iterable, Sequence

import torch

from perseid_kernels.rank_pages import RankPages
from perseid_server.adapters.lora import MAX_HEADS
from perseid_server.adapters.lowering import HEADS, HEADS_LAYER, LoweredLinear
from perseid_server.model.spec import FUSED_LINEARS, BaseSpec


class AdapterPool:
    """`num_pages` pages on `device`, to be written before use.

    Allocation is not thread-safe; `write` may run beside reads.
    """

    def __init__(self, spec: BaseSpec, num_pages: int, device: torch.device, dtype: torch.dtype) -> None:
        self.num_pages = num_pages
        self.layers: tuple[dict[str, RankPages], ...] = tuple(
            {
                fused: RankPages.allocate(num_pages, *_sizes(spec, fused), device=device, dtype=dtype)
                for fused in FUSED_LINEARS
            }
            for _ in range(spec.num_layers)
        )
        self.heads = RankPages.allocate(num_pages, *_head_sizes(spec), device=device, dtype=dtype)
        self._changes_heads: set[int] = set()  # pages
        self._free = list(reversed(range(num_pages)))  # next to be taken last
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @staticmethod
    def bytes_per_page(spec: BaseSpec, dtype: torch.dtype) -> int:
        """Device bytes of one page over all layers."""
        per_layer = sum(RankPages.bytes_per_page(*_sizes(spec, fused), dtype) for fused in FUSED_LINEARS)
        return per_layer * spec.num_layers + RankPages.bytes_per_page(*_head_sizes(spec), dtype)

    @property
    def num_free(self) -> int:
        """Pages that hold no adapter."""
        return len(self._free)

    def changes_heads(self, pages: Iterable[int]) -> bool:
        """Whether an adapter among these pages changes Medusa heads."""
        return not self._changes_heads.isdisjoint(pages)

    def allocate(self, count: int) -> tuple[int, ...] | None:
        """Pages for an adapter; None, and nothing taken, when there are too few. Those that were given back last come
        first: a page that was never written takes no memory on a CPU."""
        if count > len(self._free):
            return None
        first = len(self._free) - count
        taken = tuple(reversed(self._free[first:]))
        del self._free[first:]
        return taken

    def free(self, pages: Iterable[int]) -> None:
        """Give pages back. What they hold stays until they are written again; nobody may read it."""
        self._free.extend(reversed(tuple(pages)))

    def write(self, pages: Sequence[int], linears: Iterable[LoweredLinear]) -> None:
        """Copy an adapter into its pages, zeros where it adapts nothing. Returns when the copy is complete."""
        by_site = {(linear.layer, linear.fused): linear for linear in linears}
        if self._stream is not None:  # a step that has been launched may still read what these pages held
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            for layer, of_layer in enumerate(self.layers):
                for fused, target in of_layer.items():
                    _write(target, pages, by_site.get((layer, fused)))
            of_heads = by_site.get((HEADS_LAYER, HEADS))
            if of_heads is not None:
                self._changes_heads.update(pages)  # before: a write may fail half way
            if self.changes_heads(pages):
                _write(self.heads, pages, of_heads)
        if of_heads is None:
            self._changes_heads.difference_update(pages)
        if self._stream is not None:
            self._stream.synchronize()  # blocks the loader thread only


def _write(target: RankPages, pages: Sequence[int], linear: LoweredLinear | None) -> None:
    """A page at a time: short copies leave the memory bus to the step loop."""
    if linear is None:
        for page in pages:
            target.clear(page)
        return
    for page, a, b in zip(pages, torch.from_numpy(linear.a), torch.from_numpy(linear.b), strict=True):
        target.write(page, a, b)


def _sizes(spec: BaseSpec, fused: str) -> tuple[int, tuple[int, ...]]:
    """Inputs of a fused linear, and the widths of its projections."""
    widths = tuple(spec.projections[projection].out_features for projection in FUSED_LINEARS[fused])
    return spec.fused_shape(fused).in_features, widths


def _head_sizes(spec: BaseSpec) -> tuple[int, tuple[int, ...]]:
    """The same of the first blocks of Medusa heads."""
    return spec.hidden_size, (spec.hidden_size,) * MAX_HEADS

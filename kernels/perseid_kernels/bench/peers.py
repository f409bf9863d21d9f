"""vLLM's and SGLang's Triton LoRA kernels, called as their own layers call them, where they are installed.

Both take A as [adapters, rank, K] per projection and B as [adapters, outputs, rank]; row t uses adapter
t mod adapters. Neither is a dependency: their interfaces change, and what does not work becomes a note.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from perseid_kernels.bench.timing import eager_seconds, seconds
from perseid_kernels.rank_pages import RankPages
from perseid_kernels.segments import PAGE_RANK

Prepare = Callable[[Tensor, RankPages, int, int, Tensor], Callable[[], object]]


@dataclass(frozen=True, slots=True)
class Peer:
    """Another project's shrink + expand."""

    name: str
    module: str
    prepare: Prepare  # (x, pages, rank, adapters, out) → what adds the low-rank sums to `out`

    def installed(self) -> bool:
        """Its package can be imported."""
        return find_spec(self.module) is not None

    def seconds(self, run: Callable[[], object], device: torch.device) -> float:
        """In a graph, as ours; back to back where a graph cannot hold it."""
        try:
            return seconds(run, device)
        except RuntimeError:
            torch.cuda.synchronize(device)
            return eager_seconds(run, device)


def split_weights(pages: RankPages, rank: int, adapters: int) -> tuple[list[Tensor], list[Tensor]]:
    """The pages as plain matrices, for each projection: A [adapters, rank, K] and B [adapters, outputs, rank]."""
    per_adapter = pages.a.shape[0] // adapters
    num_inputs, num_slices = pages.a.shape[2], len(pages.slices)
    a = pages.a.view(adapters, per_adapter, num_slices, PAGE_RANK, num_inputs)
    b = pages.b.view(adapters, per_adapter * PAGE_RANK, -1)[:, :rank].transpose(1, 2)
    a_parts = [a[:, :, i].reshape(adapters, -1, num_inputs)[:, :rank].contiguous() for i in range(num_slices)]
    return a_parts, [part.contiguous() for part in b.split(list(pages.slices), dim=1)]


def _vllm(x: Tensor, pages: RankPages, rank: int, adapters: int, out: Tensor) -> Callable[[], object]:
    ops: Any = import_module("vllm.lora.ops.triton_ops")
    a, b = split_weights(pages, rank, adapters)
    mapping = (torch.arange(x.shape[0], device=x.device) % adapters).int()
    meta = ops.LoRAKernelMeta.make(adapters, x.shape[0], x.device)
    meta.prepare_tensors(mapping)
    extra = [False] if len(inspect.signature(meta.meta_args).parameters) > 1 else []
    arguments = meta.meta_args(x.shape[0], *extra)
    shrunk = torch.zeros(len(a), x.shape[0], rank, dtype=torch.float32, device=x.device)

    def run() -> None:
        ops.lora_shrink(x, a, shrunk, *arguments, 1.0)
        ops.lora_expand(shrunk, b, out, *arguments, offset_start=0, add_inputs=True)

    return run


def chunks_by_adapter(num_rows: int, adapters: int, height: int) -> tuple[list[int], list[int], list[int]]:
    """Rows sorted by adapter and cut into chunks of at most `height`: (row numbers, chunk bounds, chunk adapters)."""
    order: list[int] = []
    bounds, owners = [0], []
    for adapter in range(adapters):
        rows = list(range(adapter, num_rows, adapters))
        order.extend(rows)
        for start in range(0, len(rows), height):
            bounds.append(bounds[-1] + min(height, len(rows) - start))
            owners.append(adapter)
    return order, bounds, owners


def _sglang(x: Tensor, pages: RankPages, rank: int, adapters: int, out: Tensor) -> Callable[[], object]:
    ops: Any = import_module("sglang.srt.lora.triton_ops")
    info_type: Any = import_module("sglang.srt.lora.utils").LoRABatchInfo
    a, b = split_weights(pages, rank, adapters)
    a_all, b_all = torch.cat(a, dim=1).contiguous(), torch.cat(b, dim=1).contiguous()
    height = 16 if x.shape[0] <= 256 else 64
    order, bounds, owners = chunks_by_adapter(x.shape[0], adapters, height)

    def ints(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=x.device)

    known = {
        "use_cuda_graph": False,
        "bs": x.shape[0],
        "num_segments": len(owners),
        "max_len": height,
        "seg_indptr": ints(bounds),
        "weight_indices": ints(owners),
        "lora_ranks": ints([rank] * adapters),
        "scalings": torch.ones(adapters, device=x.device),
        "seg_lens": None,
        "permutation": ints(order),
    }
    info = info_type(**{item.name: known[item.name] for item in fields(info_type) if item.name in known})
    offsets = ints([0, *torch.tensor(pages.slices).cumsum(0).tolist()])

    def run() -> None:
        shrunk = ops.chunked_sgmv_lora_shrink_forward(x, a_all, info, len(a))
        ops.chunked_sgmv_lora_expand_forward(shrunk, b_all, info, offsets, max(pages.slices), out)

    return run


PEERS = (Peer("vLLM", "vllm", _vllm), Peer("SGLang", "sglang", _sglang))

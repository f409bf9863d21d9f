"""Nothing in a step waits for the device before sampling, and plain greedy sampling waits once.

The meta device can be written and never be read: `.item()`, `.tolist()`, `bool(tensor)`, boolean masks and copies to
the host raise there. The ops stand in for the kernels, whose launches read no tensor on the host.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from perseid_kernels.row_tiles import RowTiles, StaticSegments
from perseid_kernels.segments import PageList
from perseid_server.adapters.pool import AdapterPool
from perseid_server.model.batch import HostBatch
from perseid_server.model.build import build_decoder
from perseid_server.model.decode_graphs import DecodeGraphs
from perseid_server.model.graph_limits import GraphLimits
from perseid_server.model.kv_cache import KVCache
from perseid_server.model.sampling import SampleRequest, sample
from perseid_server.model.sampling_params import SamplingParams
from tests.server.model.tiny import opened, write_tiny

META = torch.device("meta")
PAGES = [PageList.of((0,)), None, PageList.of((2, 1))]


class UnreadableBackend:
    """Ops that give shapes only. Low-rank sums build their work list, as the Triton backend does."""

    name = "unreadable"
    compute_dtype = torch.float32
    kv_dtypes = (torch.float32,)

    def pack(self, weight: Any, device: torch.device) -> Tensor:
        return torch.empty(weight.shape, device=device)

    def matmul(self, x_TK: Tensor, packed: Tensor, out_TN: Tensor) -> None:
        torch.matmul(x_TK, packed.T, out=out_TN)

    def embed(self, packed: Tensor, token_ids_T: Tensor) -> Tensor:
        return packed[token_ids_T]

    def add_lora(self, x_TK: Tensor, pages: Any, segments: Any, out_TN: Tensor) -> None:
        tiles = segments.tiles if isinstance(segments, StaticSegments) else RowTiles.build(segments)
        assert tiles.counts.device == META

    def rms_norm(self, x_TN: Tensor, weight_N: Tensor, eps: float) -> Tensor:
        return torch.empty_like(x_TN)

    def add_rms_norm(self, x_TN: Tensor, residual_TN: Tensor, weight_N: Tensor, eps: float) -> Tensor:
        return torch.empty_like(x_TN)

    def silu_mul(self, gate_up_T2F: Tensor) -> Tensor:
        return gate_up_T2F.chunk(2, dim=1)[0].contiguous()

    def rope_and_store(self, *tensors: Tensor) -> None:
        assert all(tensor.device == META for tensor in tensors)

    def attention(self, q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Any, scale: float, out: Tensor) -> None:
        assert batch.block_table.device == META

    def move_slots(self, k_caches: Any, v_caches: Any, moves: Any) -> None:
        assert moves.sources.device == moves.indptr.device == META

    def new_pool(self) -> None:
        return None

    def record(self, run: Any, pool: Any = None) -> Any:
        run()
        return run


def test_the_device_is_not_read_in_a_forward_pass(tmp_path: Path) -> None:
    """Recorded decodes and trees with adapters and without; ordinary passes of two chunks with adapters, and of a chunk
    and a tree."""
    checkpoint, backend = opened(write_tiny(tmp_path, "qwen2", torch.bfloat16)), UnreadableBackend()
    decoder = build_decoder(checkpoint, backend, META, 64)
    pool = AdapterPool(checkpoint.spec, 3, META, torch.float32)
    kv = KVCache.allocate(checkpoint.spec, 4, 16, META, torch.float32)
    graphs = DecodeGraphs(decoder, kv, pool, backend, GraphLimits(4, 64, 16, 3, 2, max_tree_rows=8))
    for pages in (PAGES, [None] * 3):
        decode = HostBatch([5, 6, 7], [3, 0, 9], [3, 16, 41], range(4), [4, 1, 10], [[0], [1], [2]], pages, range(3))
        assert graphs.takes(decode)
        outputs = graphs.forward(decode)
        assert outputs.hidden_LE.device == outputs.logits_LV.device == META
        assert outputs.hidden_LE.shape == (3, decoder.config.hidden_size)
        assert outputs.logits_LV.shape == (3, decoder.config.vocab_size)
        tree = HostBatch(
            [5, 6, 7], [3, 4, 9], [3, 4, 25], [0, 2, 3], [5, 10], [[0], [1]], pages, range(3), (), [1, 3, 0]
        )
        assert not tree.is_decode
        assert graphs.takes(tree)
        assert graphs.forward(tree).logits_LV.shape == (3, decoder.config.vocab_size)
    chunks = HostBatch([5, 6, 7], [3, 4, 9], [3, 4, 25], [0, 2, 3], [5, 10], [[0], [1]], PAGES, [1, 2])
    assert decoder.forward(chunks.on(META), kv, pool).logits_LV.shape == (2, decoder.config.vocab_size)
    tree = replace(chunks, ancestors=[1, 3, 0]).on(META)
    assert tree.attention.trees is not None
    assert tree.attention.trees.ancestors.device == META
    assert decoder.forward(tree, kv, pool).logits_LV.shape == (2, decoder.config.vocab_size)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ways of reading a tensor on the host, as they are taken."""
    taken: list[str] = []

    def watch(name: str) -> None:
        method = getattr(Tensor, name)

        def watched(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            taken.append(name)
            return method(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, watched)

    for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        watch(name)
    return taken


def test_plain_greedy_rows_are_read_back_once(reads: list[str]) -> None:
    logits = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    logits[3, 7] = float("nan")
    greedy = SampleRequest(SamplingParams(max_tokens=4, temperature=0.0), (1,), (), 0.5)
    sampled = sample(logits, [greedy] * 5)
    assert reads == ["tolist"]
    assert [one.token_id for one in sampled if one.error is None] == logits[[0, 1, 2, 4]].argmax(dim=1).tolist()

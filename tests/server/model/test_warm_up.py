"""Compiling the kernels of prefill and of trees: chunks of both kinds of tiles, for the base and an adapter, and trees
of one span of keys and of several; stored nowhere."""

from pathlib import Path

import pytest
import torch

from perseid_server.adapters.pool import AdapterPool
from perseid_server.model import warm_up as module
from perseid_server.model.decoder import Decoder
from perseid_server.model.kv_cache import KVCache
from tests.server.model.passes import BLOCK_SIZE, CPU, backend_named, decoder_of
from tests.server.model.tiny import opened, write_tiny


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_chunks_of_both_sizes_leave_the_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    checkpoint = opened(write_tiny(tmp_path, "llama", torch.bfloat16, **small))
    decoder = decoder_of(checkpoint, backend_named("triton"), 64)
    kv = KVCache.allocate(checkpoint.spec, 2, BLOCK_SIZE, CPU, torch.float32)
    for cache in (*kv.keys, *kv.values):
        cache.fill_(7.0)
    ran: list[tuple[int, bool, int]] = []
    trees: list[bool] = []
    forward = Decoder.forward

    def watched(self, batch, kv, pools):
        ran.append((batch.token_ids_T.shape[0], batch.segments is not None, batch.attention.max_context_len))
        trees.append(batch.attention.trees is not None)
        return forward(self, batch, kv, pools)

    monkeypatch.setattr(Decoder, "forward", watched)
    monkeypatch.setattr(module, "SHORT_CHUNK", 18)
    module.warm_up(decoder, kv, AdapterPool(checkpoint.spec, 1, CPU, torch.float32), 35)
    chunks = [(18, False, 18), (18, True, 18), (35, False, 35), (35, True, 35)]
    assert ran == [*chunks, (4, False, 4), (4, False, 1024)]
    assert trees == [False] * 4 + [True] * 2
    assert all((cache == 7).all() for cache in (*kv.keys, *kv.values))

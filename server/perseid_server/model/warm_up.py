"""Compile the kernels of prefill and of trees before anybody waits for them; recording decodes compiles the others."""

import logging
import time

from perseid_kernels.segments import PageList
from perseid_server.model.batch import HostBatch
from perseid_server.model.decoder import AdapterPools, Decoder
from perseid_server.model.kv_cache import KVCache

logger = logging.getLogger(__name__)

SHORT_CHUNK = 128
"""Rows: products of up to so many take other tiles than those of more."""

LONG_CONTEXT = 1024
"""Tokens: attention takes the keys of more than a span of 512 apart, and merges."""


def warm_up(decoder: Decoder, kv: KVCache, pools: AdapterPools, max_rows: int) -> None:
    """Run chunks that are stored nowhere, for the base and for an adapter, and beside trees with short and long
    prefixes. Only for a backend that knows padding."""
    started = time.perf_counter()
    block_size = kv.keys[0].shape[1]
    for rows in sorted({min(SHORT_CHUNK, max_rows), max_rows}):
        for pages in (None, PageList.of((0,))):
            decoder.forward(_chunk(rows, block_size, pages).on(decoder.device), kv, pools)
    for context in (4, LONG_CONTEXT):
        decoder.forward(_beside_a_tree(context, block_size).on(decoder.device), kv, pools)
    logger.info("compiled the kernels of prefill in %.1f s", time.perf_counter() - started)


def _chunk(rows: int, block_size: int, pages: PageList | None) -> HostBatch:
    """A prompt of padding: it reads block 0, whatever that holds, and nobody looks at what comes of it."""
    return HostBatch(
        token_ids=[0] * rows,
        positions=[0] * rows,
        slots=[-1] * rows,
        query_start=[0, rows],
        context_len=[rows],
        blocks=[[0] * -(-rows // block_size)],
        pages=[pages] * rows,
        logits_rows=[rows - 1],
    )


def _beside_a_tree(context: int, block_size: int) -> HostBatch:
    """A chunk of two rows and a tree of two, both of padding."""
    return HostBatch(
        token_ids=[0] * 4,
        positions=[0] * 4,
        slots=[-1] * 4,
        query_start=[0, 2, 4],
        context_len=[context, context],
        blocks=[[0] * -(-context // block_size)] * 2,
        pages=[None] * 4,
        logits_rows=[1, 2, 3],
        ancestors=[0, 0, 0b01, 0b11],
    )

"""Causal attention over a paged KV cache; prefill chunks and decodes of one batch.

    out[t, h] = Σ_{i ≤ pos(t)} softmax_i(scale · q[t, h] · K[i, h // G]) V[i, h // G]          G = H / Hkv

q, out [T, H, D]; caches [NB, BS, Hkv, D]; key i of sequence s lies in block `block_table[s, i // BS]`, offset
i % BS. Scores, softmax and sums in float32 (online softmax: Milakov & Gimelshein, arXiv:1805.02867; tiles after
FlashAttention). The G query heads of one key/value head share a tile, so K and V are read once for all of them.

Keys are taken in *spans* of SPAN; each span has an online softmax of its own and spans are merged in order
(FlashDecoding's formula). Decodes run a program per span and merge afterwards; prefill tiles do the spans one
after the other. Tiles and spans lie at fixed positions and a sequence of one new row always takes the decode
kernel, so a row's result does not depend on the other sequences of the batch.

Rows of trees (`TreeRows`) each take the decode kernel, in programs behind those of the sequences (which have none,
S = 0, where all rows are trees'): tiles within the prefix as any decode, and in the tiles behind it each key is looked
up in the row's ancestors. So such a row has the bits of a decode after its ancestors.

No list is built on the host: a prefill program finds its sequence by bisection of `query_start`.
CPU paths: `eager_backend.EagerBackend.attention` and `native/`. Oracle: `attention_oracle`.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from dataclasses import dataclass
from math import log2

import torch
from torch import Tensor

from perseid_kernels._triton import cdiv, power_of_two, tl, triton
from perseid_kernels.attention_tiles import NEVER, attend_span, find_row, load_group
from perseid_kernels.backend import AttentionBatch
from perseid_kernels.devices import compiler_options, device_class

_LOG2_E = log2(2.718281828459045)
_MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Launch knobs of attention."""

    block_m: int  # rows of a tile: query rows × heads of a group (a power of two each)
    block_keys: int
    span: int  # keys of one decode program, a multiple of block_keys
    num_warps: int
    num_stages: int


def choose_config(group: int, head_dim: int, *, decode: bool, kind: str = "sm_80") -> AttentionConfig:
    """One tile of the group's heads for decode; 64 rows for prefill. Wide heads take narrower key tiles, more warps
    or fewer rows, so that the two accumulators of a prefill tile stay in registers. sm_90's matrix instructions
    leave the operands in shared memory, which saves registers, and want 64 rows."""
    wide = 128 if kind == "sm_90" else 64  # head dims up to this afford 64 keys
    keys = 64 if head_dim <= wide or (decode and head_dim <= 128) else 32
    if decode:
        return AttentionConfig(max(16, power_of_two(group)), keys, span=512, num_warps=4, num_stages=2)
    rows = 32 if head_dim > 128 and kind != "sm_90" else 64
    warps = 4 if head_dim <= 64 else 8
    return AttentionConfig(max(rows, power_of_two(group)), keys, span=512, num_warps=warps, num_stages=2)


@triton.jit(do_not_specialize=["S", "stride_table"])  # every batch by the same code: none is compiled while serving
def attention_prefill_kernel(
    q,  # [T, H, D]
    k_cache,  # [NB, BS, Hkv, D]
    v_cache,
    query_start,  # int32 [S+1]
    context_len,  # int32 [S]
    block_table,  # int32 [S, max blocks]
    ancestors,  # int64 [T], read where TREES
    out,  # [T, H, D]
    scale_log2,
    S,
    stride_q,
    stride_out,
    stride_table,
    stride_block,
    stride_token,
    stride_head,
    TREES: tl.constexpr,  # some sequences are trees
    G: tl.constexpr,
    GROUP: tl.constexpr,  # G rounded up to a power of two
    BS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Tiles of TOKENS query rows. Sequence s owns the tile numbers from query_start[s] // TOKENS + s on."""
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    low = 0
    high = S
    while low + 1 < high:  # the last s whose first tile is ≤ tile
        middle = (low + high) // 2
        if tl.load(query_start + middle) // TOKENS + middle <= tile:
            low = middle
        else:
            high = middle
    first_row = tl.load(query_start + low)
    query_len = tl.load(query_start + low + 1) - first_row
    first_token = (tile - (first_row // TOKENS + low)) * TOKENS
    skipped = (query_len <= 1) | (first_token >= query_len)
    if TREES:
        skipped |= tl.load(ancestors + first_row, mask=query_len > 1, other=0) != 0
    if skipped:
        return  # a decode or a tree (the other kernel's), or a tile number no row fell on

    context = tl.load(context_len + low)
    lane = tl.arange(0, BLOCK_M)
    head = lane % GROUP
    token = first_token + lane // GROUP
    live = (head < G) & (token < query_len)
    position = tl.where(live, context - query_len + token, -1)
    q_MD = load_group(q, first_row + token, kv_head, head, live, stride_q, G, D, BLOCK_D)
    end_key = tl.minimum(context - query_len + first_token + TOKENS, context)

    m = tl.full((BLOCK_M,), NEVER, dtype=tl.float32)
    den = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for start in range(0, end_key, SPAN):
        m_s, den_s, acc_s = attend_span(
            q_MD, position, start, tl.minimum(start + SPAN, end_key), 0, 0, 0, k_cache, v_cache,
            block_table + low * stride_table, kv_head, scale_log2, stride_block, stride_token, stride_head,
            BS, D, BLOCK_M, BLOCK_D, BLOCK_KEYS, False,
        )  # fmt: skip
        m_new = tl.maximum(m, m_s)
        old = tl.exp2(m - m_new)
        new = tl.exp2(m_s - m_new)
        den = den * old + den_s * new
        acc = acc * old[:, None] + acc_s * new[:, None]
        m = m_new

    d = tl.arange(0, BLOCK_D)
    result = acc / den[:, None]
    base = (first_row + token).to(tl.int64) * stride_out + (kv_head * G + head) * D
    mask = live[:, None] & (d < D)[None, :]
    tl.store(out + base[:, None] + d[None, :], result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["S", "spans", "stride_table"])
def attention_decode_kernel(
    q,  # [T, H, D]
    k_cache,  # [NB, BS, Hkv, D]
    v_cache,
    query_start,  # int32 [S+1]
    context_len,  # int32 [S]
    block_table,  # int32 [S, max blocks]
    ancestors,  # int64 [T], read where TREES, as are:
    tree_rows,  # int32 [R]
    tree_sequences,  # int32 [R]
    out,  # [T, H, D]; written where SPANS == 1
    parts,  # float32 [S + R, H, SPANS, D]; written otherwise, as are:
    maxima,  # float32 [S + R, H, SPANS]
    sums,  # float32 [S + R, H, SPANS]
    scale_log2,
    S,
    spans,
    stride_q,
    stride_out,
    stride_table,
    stride_block,
    stride_token,
    stride_head,
    ONE_SPAN: tl.constexpr,
    TREES: tl.constexpr,  # some sequences are trees
    G: tl.constexpr,
    BS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """One span of the keys of one row, which is a sequence's only new one or one of a tree, for one key/value head."""
    program = tl.program_id(0)
    kv_head = tl.program_id(1)
    span = tl.program_id(2)
    row, sequence, keys, prefix, seen, query_len = find_row(
        program, query_start, context_len, ancestors, tree_rows, tree_sequences, S, TREES
    )
    if span * SPAN >= keys:
        return  # a prefill chunk (the other kernel's), a tree (the last programs'), or past the row's end

    head = tl.arange(0, BLOCK_M)
    live = head < G
    position = tl.where(live, keys - 1, -1)
    q_MD = load_group(q, row + head * 0, kv_head, head, live, stride_q, G, D, BLOCK_D)
    m, den, acc = attend_span(
        q_MD, position, span * SPAN, tl.minimum((span + 1) * SPAN, keys), prefix, seen, query_len, k_cache, v_cache,
        block_table + sequence * stride_table, kv_head, scale_log2, stride_block, stride_token, stride_head,
        BS, D, BLOCK_M, BLOCK_D, BLOCK_KEYS, TREES,
    )  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    mask = live[:, None] & (d < D)[None, :]
    if ONE_SPAN:
        result = acc / den[:, None]
        base = row.to(tl.int64) * stride_out + (kv_head * G + head) * D
        tl.store(out + base[:, None] + d[None, :], result.to(out.dtype.element_ty), mask=mask)
    else:
        part = ((program * tl.num_programs(1) + kv_head) * G + head).to(tl.int64) * spans + span
        tl.store(parts + part[:, None] * D + d[None, :], acc, mask=mask)
        tl.store(maxima + part, m, mask=live)
        tl.store(sums + part, den, mask=live)


@triton.jit(do_not_specialize=["S", "spans"])
def attention_merge_kernel(
    parts,  # float32 [S + R, H, SPANS, D]
    maxima,
    sums,
    query_start,
    context_len,
    ancestors,
    tree_rows,
    tree_sequences,
    out,  # [T, H, D]
    S,
    spans,
    stride_out,
    TREES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Merge the spans of one decoding row and head, in order."""
    program = tl.program_id(0)
    head = tl.program_id(1)
    row, _, keys, _, _, _ = find_row(program, query_start, context_len, ancestors, tree_rows, tree_sequences, S, TREES)
    if keys == 0:
        return
    d = tl.arange(0, BLOCK_D)
    first = (program * tl.num_programs(1) + head).to(tl.int64) * spans
    m = tl.full((), NEVER, dtype=tl.float32)
    den = tl.zeros((), dtype=tl.float32)
    acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for span in range(tl.cdiv(keys, SPAN)):
        m_s = tl.load(maxima + first + span)
        m_new = tl.maximum(m, m_s)
        old = tl.exp2(m - m_new)
        new = tl.exp2(m_s - m_new)
        den = den * old + tl.load(sums + first + span) * new
        acc = acc * old + tl.load(parts + (first + span) * D + d, mask=d < D, other=0.0) * new
        m = m_new
    result = (acc / den).to(out.dtype.element_ty)
    tl.store(out + row.to(tl.int64) * stride_out + head * D + d, result, mask=d < D)


def attention(
    q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, scale: float, out_THD: Tensor
) -> None:
    """Write out[t] for every row of the batch. q may be a view with a wider row stride; heads are contiguous.

    Raises ValueError for heads wider than 256: no tile of them fits the registers.
    """
    if q_THD.shape[2] > _MAX_HEAD_DIM:
        raise ValueError(f"head dim {q_THD.shape[2]}: the Triton attention kernels hold at most {_MAX_HEAD_DIM}")
    if q_THD.shape[0] == 0:
        return
    _decode(q_THD, k_cache, v_cache, batch, scale, out_THD)
    if batch.max_query_len > 1:
        _prefill(q_THD, k_cache, v_cache, batch, scale, out_THD)


def _prefill(
    q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, scale: float, out_THD: Tensor
) -> None:
    num_rows, num_heads, head_dim = q_THD.shape
    _, block_size, num_kv_heads, _ = k_cache.shape
    group = num_heads // num_kv_heads
    num_sequences = batch.context_len.shape[0]
    kind = device_class(q_THD.device)
    config = choose_config(group, head_dim, decode=False, kind=kind)
    tokens = config.block_m // power_of_two(group)
    attention_prefill_kernel[(num_rows // tokens + num_sequences, num_kv_heads)](
        q_THD,
        k_cache,
        v_cache,
        batch.query_start,
        batch.context_len,
        batch.block_table,
        _tree_tensors(batch)[0],
        out_THD,
        scale * _LOG2_E,
        num_sequences,
        q_THD.stride(0),
        out_THD.stride(0),
        batch.block_table.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        TREES=batch.trees is not None,
        G=group,
        GROUP=power_of_two(group),
        BS=block_size,
        D=head_dim,
        BLOCK_M=config.block_m,
        BLOCK_D=power_of_two(max(16, head_dim)),
        BLOCK_KEYS=config.block_keys,
        SPAN=config.span,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **compiler_options(kind),
    )


def _decode(
    q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, scale: float, out_THD: Tensor
) -> None:
    _, num_heads, head_dim = q_THD.shape
    _, block_size, num_kv_heads, _ = k_cache.shape
    group = num_heads // num_kv_heads
    num_sequences, num_tree_rows = batch.context_len.shape[0], 0
    if batch.trees is not None:
        num_tree_rows = batch.trees.rows.shape[0]
        num_sequences = 0 if num_tree_rows == q_THD.shape[0] else num_sequences  # no sequence has a program of its own
    num_programs = num_sequences + num_tree_rows
    kind = device_class(q_THD.device)
    config = choose_config(group, head_dim, decode=True, kind=kind)
    spans = cdiv(batch.max_context_len, config.span)
    held = (num_programs, num_heads, spans) if spans > 1 else (0, 0, 0)
    parts = torch.empty((*held, head_dim), dtype=torch.float32, device=q_THD.device)
    maxima, sums = torch.empty((2, *held), dtype=torch.float32, device=q_THD.device)
    block_d = power_of_two(max(16, head_dim))
    attention_decode_kernel[(num_programs, num_kv_heads, spans)](
        q_THD,
        k_cache,
        v_cache,
        batch.query_start,
        batch.context_len,
        batch.block_table,
        *_tree_tensors(batch),
        out_THD,
        parts,
        maxima,
        sums,
        scale * _LOG2_E,
        num_sequences,
        spans,
        q_THD.stride(0),
        out_THD.stride(0),
        batch.block_table.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        ONE_SPAN=spans == 1,
        TREES=batch.trees is not None,
        G=group,
        BS=block_size,
        D=head_dim,
        BLOCK_M=config.block_m,
        BLOCK_D=block_d,
        BLOCK_KEYS=config.block_keys,
        SPAN=config.span,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **compiler_options(kind),
    )
    if spans > 1:
        attention_merge_kernel[(num_programs, num_heads)](
            parts,
            maxima,
            sums,
            batch.query_start,
            batch.context_len,
            *_tree_tensors(batch),
            out_THD,
            num_sequences,
            spans,
            out_THD.stride(0),
            TREES=batch.trees is not None,
            D=head_dim,
            BLOCK_D=block_d,
            SPAN=config.span,
            num_warps=1,
        )


def _tree_tensors(batch: AttentionBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Ancestors, rows and sequences of the trees; stand-ins where there are none, which nothing reads."""
    if batch.trees is None:
        return (batch.query_start,) * 3
    return batch.trees.ancestors, batch.trees.rows, batch.trees.sequences


def attention_oracle(q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, scale: float) -> Tensor:
    """out in float32 [T, H, D], one row and head at a time, by the definition."""
    block_size, num_kv_heads = k_cache.shape[1:3]
    out = torch.zeros(q_THD.shape, dtype=torch.float32)
    group = q_THD.shape[1] // num_kv_heads
    for s, context in enumerate(batch.context_len.tolist()):
        start, end = int(batch.query_start[s]), int(batch.query_start[s + 1])
        places = [(int(batch.block_table[s, i // block_size]), i % block_size) for i in range(context)]
        keys = torch.stack([k_cache[place] for place in places]).float()
        values = torch.stack([v_cache[place] for place in places]).float()
        prefix = context - (end - start)
        for row in range(start, end):
            ancestors = 0 if batch.trees is None else int(batch.trees.ancestors[row])
            new = [j for j in range(end - start) if (ancestors >> j & 1 if ancestors else j <= row - start)]
            seen = [*range(prefix), *(prefix + j for j in new)]
            for head in range(q_THD.shape[1]):
                scores = scale * (keys[seen, head // group] @ q_THD[row, head].float())
                out[row, head] = torch.softmax(scores, dim=0) @ values[seen, head // group]
    return out

"""What attention's kernels share: the row that a program serves, its queries, and its keys a tile at a time.

Equation and launchers: attention.py.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from perseid_kernels._triton import tl, triton

NEVER = tl.constexpr(-1e30)  # the running maximum before any key: finite, so that differences stay defined


@triton.jit
def find_row(program, query_start, context_len, ancestors, tree_rows, tree_sequences, S, TREES: tl.constexpr):
    """(row, sequence, keys it sees, prefix, ancestors, rows of its sequence) that a program of a decode serves: the
    only row of sequence `program`, and from S on the rows of trees. No keys where there is nothing to do."""
    tree = program - S
    sequence = program
    if TREES:
        sequence = tl.load(tree_sequences + tree, mask=tree >= 0, other=program)
    row = tl.load(query_start + sequence)
    query_len = tl.load(query_start + sequence + 1) - row
    context = tl.load(context_len + sequence)
    prefix = context - query_len
    keys = tl.where(query_len == 1, context, 0)
    seen = tl.zeros((), dtype=tl.int64)
    if TREES:
        row = tl.load(tree_rows + tree, mask=tree >= 0, other=row)
        seen = tl.load(ancestors + row, mask=query_len > 0, other=0)
        keys = tl.where(seen == 0, keys, 0)
        if tree >= 0:
            keys = prefix
            for bit in range(query_len):
                keys += ((seen >> bit) & 1).to(tl.int32)
    return row, sequence, keys, prefix, seen, query_len


@triton.jit
def cached_place(key_N, prefix, ancestors, query_len):
    """Where the cache holds a tree row's keys: the prefix as it is, then the rows of the set bits, in their order."""
    place_N = key_N
    position = prefix
    for bit in range(query_len):
        is_seen = ((ancestors >> bit) & 1).to(tl.int32)
        place_N = tl.where((key_N == position) & (is_seen > 0), prefix + bit, place_N)
        position += is_seen
    return place_N


@triton.jit
def attend_tiles(
    m,
    den,
    acc,
    q_MD,
    position_M,  # the last key each row sees; −1 for padding
    first_key,
    end_key,
    prefix,  # of a tree row, as are:
    ancestors,
    query_len,
    k_cache,
    v_cache,
    table,  # block table of the sequence
    kv_head,
    scale_log2,
    stride_block,
    stride_token,
    stride_head,
    BS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BRANCH: tl.constexpr,  # keys behind the prefix are looked up
):
    """(m, den, acc) with keys [first_key, end_key) taken in: row maximum, Σ 2^(s − m), Σ 2^(s − m) · v."""
    d = tl.arange(0, BLOCK_D)
    for start in range(first_key, end_key, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        live = key < end_key
        place = key
        if BRANCH:
            place = cached_place(key, prefix, ancestors, query_len)
        block = tl.load(table + place // BS, mask=live, other=0).to(tl.int64)
        where = block * stride_block + (place % BS) * stride_token + kv_head * stride_head
        mask = live[:, None] & (d < D)[None, :]
        k_ND = tl.load(k_cache + where[:, None] + d[None, :], mask=mask, other=0.0)
        v_ND = tl.load(v_cache + where[:, None] + d[None, :], mask=mask, other=0.0)
        seen = live[None, :] & (key[None, :] <= position_M[:, None])
        s = tl.dot(q_MD, tl.trans(k_ND.to(q_MD.dtype)), input_precision="ieee") * scale_log2
        s = tl.where(seen, s, NEVER)
        m_new = tl.maximum(m, tl.max(s, axis=1))
        p = tl.exp2(s - m_new[:, None])
        fade = tl.exp2(m - m_new)
        den = den * fade + tl.sum(p, axis=1)
        acc = tl.dot(p.to(q_MD.dtype), v_ND.to(q_MD.dtype), acc * fade[:, None], input_precision="ieee")
        m = m_new
    return m, den, acc


@triton.jit
def attend_span(
    q_MD,
    position_M,
    first_key,
    end_key,
    prefix,
    ancestors,
    query_len,
    k_cache,
    v_cache,
    table,
    kv_head,
    scale_log2,
    stride_block,
    stride_token,
    stride_head,
    BS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BRANCH: tl.constexpr,
):
    """`attend_tiles` of one span, from nothing on. With BRANCH, tiles that end within the prefix are taken as any
    others are; only those behind it look keys up.

    A row that sees none of the keys ends with m = NEVER and finite sums, which a merge multiplies by 2^−∞ = 0:
    every row sees key 0, so its maximum in the first span is a real one.
    """
    m = tl.full((BLOCK_M,), NEVER, dtype=tl.float32)
    den = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    whole = end_key
    if BRANCH:
        whole = tl.maximum(first_key, tl.minimum(end_key, prefix // BLOCK_KEYS * BLOCK_KEYS))
    m, den, acc = attend_tiles(
        m, den, acc, q_MD, position_M, first_key, whole, prefix, ancestors, query_len, k_cache, v_cache, table,
        kv_head, scale_log2, stride_block, stride_token, stride_head, BS, D, BLOCK_D, BLOCK_KEYS, False,
    )  # fmt: skip
    if BRANCH:
        m, den, acc = attend_tiles(
            m, den, acc, q_MD, position_M, whole, end_key, prefix, ancestors, query_len, k_cache, v_cache, table,
            kv_head, scale_log2, stride_block, stride_token, stride_head, BS, D, BLOCK_D, BLOCK_KEYS, True,
        )  # fmt: skip
    return m, den, acc


@triton.jit
def load_group(q, row_M, kv_head, head_M, live_M, stride_q, G, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Query vectors [BLOCK_M, BLOCK_D] of rows `row_M`, heads kv_head · G + head_M."""
    d = tl.arange(0, BLOCK_D)
    base = row_M.to(tl.int64) * stride_q + (kv_head * G + head_M) * D
    return tl.load(q + base[:, None] + d[None, :], mask=live_M[:, None] & (d < D)[None, :], other=0.0)

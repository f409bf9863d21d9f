"""Attention of drafted trees: the definition, and the very bits of a decode after the row's ancestors."""

from dataclasses import replace

import pytest
import torch

from perseid_kernels.attention import attention_oracle
from perseid_kernels.backend import Backend
from tests.kernels.cases import DEVICE, SENTINEL, UNIT_ROUNDOFF
from tests.kernels.tree_cases import New, chain, plain_decode, random_tree, tree_batch

pytestmark = pytest.mark.usefixtures("ordered_dot")

BORDERS = [0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 511, 512, 513]
"""Prefixes that end before, at and behind the end of a block, of a tile of keys and of a span."""


def mixed(rng: torch.Generator) -> list[New]:
    """Chunks, decodes and trees of ragged sizes: of one row, of all 64, a chain, a star."""
    return [
        New(random_tree(rng, 6), 70),
        New(5, 20),
        New(1, 30),
        New(random_tree(rng, 64), 63),
        New([], 64),
        New(1, 0),
        New(chain(9), 60),
        New(7, 0),
        New([0] * 4, 510),
    ]


def filled(rng: torch.Generator, blocks: int, block_size: int, kv_heads: int, head_dim: int):
    """Caches in which block 0, which belongs to nobody, must not matter."""
    shape = (blocks, block_size, kv_heads, head_dim)
    k, v = torch.randn(shape, generator=rng), torch.randn(shape, generator=rng)
    k[0], v[0] = SENTINEL, SENTINEL
    return k.to(DEVICE), v.to(DEVICE)


def attended(backend: Backend, q, caches, batch, scale: float) -> torch.Tensor:
    out = torch.full(q.shape, SENTINEL, device=DEVICE)
    backend.attention(q, *caches, batch, scale, out)
    return out


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "block_size"), [(6, 2, 32, 16), (2, 1, 40, 24)])
def test_a_mixed_batch_equals_the_definition(
    backend: Backend, rng: torch.Generator, heads: int, kv_heads: int, head_dim: int, block_size: int
) -> None:
    batch, blocks = tree_batch(rng, mixed(rng), block_size)
    k, v = filled(rng, blocks, block_size, kv_heads, head_dim)
    q = torch.randn(int(batch.query_start[-1]), heads, head_dim, generator=rng)
    scale = head_dim**-0.5
    out = attended(backend, q.to(DEVICE), (k, v), batch, scale)
    expected = attention_oracle(q, k.cpu(), v.cpu(), batch, scale)
    score_error = 2 * head_dim * UNIT_ROUNDOFF * 16 * scale  # the bound of test_attention.py
    tolerance = 10 * score_error + 10 * batch.max_context_len * UNIT_ROUNDOFF
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=tolerance)


def assert_rows_are_decodes(backend: Backend, q, caches, batch) -> None:
    """Every row of every tree has the bits of a plain decode after its ancestors."""
    out = attended(backend, q, caches, batch, 0.3)
    rows = batch.trees.rows.tolist()
    assert rows
    for row in rows:
        alone, own = plain_decode(batch, row, *caches)
        expected = attended(backend, q[row : row + 1].contiguous(), own, alone, 0.3)
        assert torch.equal(out[row], expected[0]), f"row {row}"


def test_tree_rows_have_the_bits_of_decodes_in_a_mixed_batch(backend: Backend, rng: torch.Generator) -> None:
    batch, blocks = tree_batch(rng, mixed(rng), 16)
    caches = filled(rng, blocks, 16, 1, 32)
    q = torch.randn(int(batch.query_start[-1]), 3, 32, generator=rng).to(DEVICE)
    assert_rows_are_decodes(backend, q, caches, batch)


@pytest.mark.parametrize("prefix", BORDERS)
def test_tree_rows_have_the_bits_of_decodes_at_every_border(
    backend: Backend, rng: torch.Generator, prefix: int
) -> None:
    """A tree that ends where its block does, one that goes on in a new block, and heads of no whole vector."""
    news = [New(random_tree(rng, rows), prefix) for rows in (3, 16)]
    batch, blocks = tree_batch(rng, news, 16)
    caches = filled(rng, blocks, 16, 1, 24)
    q = torch.randn(19, 2, 24, generator=rng).to(DEVICE)
    assert_rows_are_decodes(backend, q, caches, batch)


def test_plain_rows_beside_trees_have_the_bits_they_have_alone(backend: Backend, rng: torch.Generator) -> None:
    news = mixed(rng)
    batch, blocks = tree_batch(rng, news, 16)
    caches = filled(rng, blocks, 16, 1, 32)
    q = torch.randn(int(batch.query_start[-1]), 2, 32, generator=rng).to(DEVICE)
    together = attended(backend, q, caches, batch, 0.3)
    for s, new in enumerate(news):
        if isinstance(new.rows, int):
            start, end = batch.query_start[s : s + 2].tolist()
            alone = replace(
                batch,
                query_start=torch.tensor([0, end - start], dtype=torch.int32, device=DEVICE),
                context_len=batch.context_len[s : s + 1],
                block_table=batch.block_table[s : s + 1],
                max_query_len=end - start,
                max_context_len=int(batch.context_len[s]),
                trees=None,
            )
            assert torch.equal(attended(backend, q[start:end], caches, alone, 0.3), together[start:end]), s


def test_a_chain_is_a_chunk(backend: Backend, rng: torch.Generator) -> None:
    """By the definition, not by bits: Triton's chunks have a kernel of their own."""
    batch, blocks = tree_batch(rng, [New(chain(20), 50)], 16)
    caches = filled(rng, blocks, 16, 1, 32)
    q = torch.randn(20, 2, 32, generator=rng).to(DEVICE)
    chunk = attended(backend, q, caches, replace(batch, trees=None, max_query_len=20), 0.3)
    torch.testing.assert_close(attended(backend, q, caches, batch, 0.3), chunk, rtol=0, atol=1e-5)


def test_a_branch_does_not_see_its_neighbours(backend: Backend, rng: torch.Generator) -> None:
    """Other branches' keys and values are NaN: one read would show."""
    batch, blocks = tree_batch(rng, [New([0, 0, 1, 2], 30)], 16)
    k, v = filled(rng, blocks, 16, 1, 32)
    q = torch.randn(5, 2, 32, generator=rng).to(DEVICE)
    whole = attended(backend, q, (k, v), batch, 0.3)
    table = batch.block_table[0].tolist()
    for place in (32, 34):  # the branch of rows 2 and 4; rows 0, 1 and 3 are the other one
        for cache in (k, v):
            cache[table[place // 16], place % 16] = float("nan")
    assert torch.equal(attended(backend, q, (k, v), batch, 0.3)[[0, 1, 3]], whole[[0, 1, 3]])

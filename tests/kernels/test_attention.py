"""Paged attention: prefill chunks and decodes in one batch, against the row-by-row oracle."""

import pytest
import torch

from perseid_kernels.attention import attention_oracle
from perseid_kernels.backend import AttentionBatch, Backend
from tests.kernels.cases import DEVICE, SENTINEL, UNIT_ROUNDOFF, attention_batch


def caches(rng: torch.Generator, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int):
    """K and V caches; what block 0 and the tail of a last block hold must not matter."""
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    k, v = torch.randn(shape, generator=rng), torch.randn(shape, generator=rng)
    k[0], v[0] = SENTINEL, SENTINEL
    return k, v


def assert_attends(backend: Backend, q, k, v, batch: AttentionBatch, scale: float) -> None:
    out = torch.full(q.shape, SENTINEL, device=DEVICE)
    backend.attention(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), batch, scale, out)
    # A score is a sum of D products of size ~ 4 at most: its error e ≤ 2·D·u·16·scale moves a probability by a
    # factor of 1 ± e; the weighted mean of values |v| ≤ 5 then moves by ≤ 2·5·e, and summing it adds 2·n·u·5.
    score_error = 2 * q.shape[-1] * UNIT_ROUNDOFF * 16 * scale
    tolerance = 10 * score_error + 10 * batch.max_context_len * UNIT_ROUNDOFF
    torch.testing.assert_close(out.cpu(), attention_oracle(q, k, v, batch, scale), rtol=0, atol=tolerance)


# (H, Hkv, D): groups of 3, 1 and 8; head dims 64, 48, which is no power of two, and the widest
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (2, 2, 48), (8, 1, 32), (2, 1, 256)])
@pytest.mark.parametrize("block_size", [16, 24])
def test_mixed_batch_equals_the_definition(
    backend: Backend, rng: torch.Generator, heads: int, kv_heads: int, head_dim: int, block_size: int
) -> None:
    """A first token, decodes, a whole prompt, a chunk on a prefix, a decode that ends a block exactly."""
    batch, blocks = attention_batch(rng, [1, 5, 1, 37, 2, 1], [0, 0, 70, 20, 14, 47], block_size)
    k, v = caches(rng, blocks, block_size, kv_heads, head_dim)
    q = torch.randn(47, heads, head_dim, generator=rng)
    assert_attends(backend, q, k, v, batch, head_dim**-0.5)


def test_only_decodes(backend: Backend, rng: torch.Generator) -> None:
    batch, blocks = attention_batch(rng, [1, 1, 1], [3, 64, 0], 16)
    k, v = caches(rng, blocks, 16, 2, 32)
    assert_attends(backend, torch.randn(3, 4, 32, generator=rng), k, v, batch, 0.2)


def test_contexts_longer_than_a_span(backend: Backend, rng: torch.Generator) -> None:
    """Keys are taken in spans of 512: below, at and above a boundary, in both kernels, and short neighbours."""
    batch, blocks = attention_batch(rng, [1, 1, 2, 3, 1], [511, 512, 510, 1050, 4], 16)
    k, v = caches(rng, blocks, 16, 1, 16)
    assert_attends(backend, torch.randn(8, 2, 16, generator=rng), k, v, batch, 0.25)


def test_large_scores_do_not_overflow(backend: Backend, rng: torch.Generator) -> None:
    """Scores of ± 4000 in the first and second span: a softmax without its maximum would be inf / inf."""
    batch, blocks = attention_batch(rng, [1, 4], [600, 0], 16)
    k, v = caches(rng, blocks, 16, 1, 16)
    q = torch.randn(5, 2, 16, generator=rng) * 300
    out = torch.empty(5, 2, 16, device=DEVICE)
    backend.attention(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), batch, 1.0, out)
    expected = attention_oracle(q, k, v, batch, 1.0)
    # scores of 4000 carry an error of 16 · 4000 · u ≈ 4e-3, which is also that of a probability
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=0.05)


def test_q_may_be_a_view_of_qkv(backend: Backend, rng: torch.Generator) -> None:
    batch, blocks = attention_batch(rng, [1, 6], [9, 0], 16)
    k, v = caches(rng, blocks, 16, 2, 32)
    qkv = torch.randn(7, (4 + 2 + 2) * 32, generator=rng)
    q = qkv[:, : 4 * 32].view(7, 4, 32)
    out = torch.empty(7, 4, 32, device=DEVICE)
    backend.attention(qkv.to(DEVICE)[:, : 4 * 32].view(7, 4, 32), k.to(DEVICE), v.to(DEVICE), batch, 0.2, out)
    torch.testing.assert_close(out.cpu(), attention_oracle(q, k, v, batch, 0.2), rtol=0, atol=1e-5)


def test_a_head_too_wide_is_refused(triton_backend: Backend) -> None:
    batch, blocks = attention_batch(torch.Generator(), [1], [3], 16)
    cache = torch.zeros(blocks, 16, 1, 512, device=DEVICE)
    q = torch.zeros(1, 1, 512, device=DEVICE)
    with pytest.raises(ValueError, match="head dim 512"):
        triton_backend.attention(q, cache, cache, batch, 1.0, torch.empty_like(q))

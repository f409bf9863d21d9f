"""Norms, rotary embedding with the cache store, and the gated activation."""

import pytest
import torch

from perseid_kernels.activation import silu_mul_oracle
from perseid_kernels.backend import Backend
from perseid_kernels.norm import rms_norm_oracle
from perseid_kernels.rope import rope_oracle
from tests.kernels.cases import DEVICE, SENTINEL, UNIT_ROUNDOFF

# An element passes through about ten roundings (mean and root, two products; exp, sum, quotient, product).
# The mean is a sum of squares, all of one sign, so its own error is at most log2(width) of them in a tree.
RTOL = 32 * UNIT_ROUNDOFF


@pytest.mark.parametrize("width", [1, 311, 576])
def test_rms_norm(backend: Backend, rng: torch.Generator, width: int) -> None:
    x, weight = torch.randn(5, width, generator=rng), torch.randn(width, generator=rng)
    out = backend.rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-5)
    torch.testing.assert_close(out.cpu(), rms_norm_oracle(x, weight, 1e-5), rtol=RTOL, atol=0)


def test_rms_norm_of_zeros_is_zero(backend: Backend) -> None:
    out = backend.rms_norm(torch.zeros(2, 8, device=DEVICE), torch.ones(8, device=DEVICE), 1e-6)
    assert (out == 0).all()


def test_rms_norm_per_head_of_a_strided_view(backend: Backend, rng: torch.Generator) -> None:
    """Qwen3's q norm: [T, H, D] inside a wider qkv row."""
    qkv, weight = torch.randn(4, 7 * 24, generator=rng), torch.randn(24, generator=rng)
    q = qkv[:, 24 : 24 + 3 * 24].view(4, 3, 24)
    on_device = qkv.to(DEVICE)[:, 24 : 24 + 3 * 24].view(4, 3, 24)
    out = backend.rms_norm(on_device, weight.to(DEVICE), 1e-6)
    assert out.shape == (4, 3, 24)
    torch.testing.assert_close(out.cpu(), rms_norm_oracle(q, weight, 1e-6), rtol=RTOL, atol=0)


def test_add_rms_norm_keeps_the_sum(backend: Backend, rng: torch.Generator) -> None:
    x, residual = torch.randn(2, 6, 311, generator=rng)
    weight = torch.randn(311, generator=rng)
    held = residual.clone().to(DEVICE)
    out = backend.add_rms_norm(x.to(DEVICE), held, weight.to(DEVICE), 1e-5)
    assert torch.equal(held.cpu(), x + residual)
    torch.testing.assert_close(out.cpu(), rms_norm_oracle(x + residual, weight, 1e-5), rtol=RTOL, atol=0)


@pytest.mark.parametrize("width", [1, 311, 1100])
def test_silu_mul(backend: Backend, rng: torch.Generator, width: int) -> None:
    gate_up = torch.randn(5, 2 * width, generator=rng) * 8
    out = backend.silu_mul(gate_up.to(DEVICE))
    torch.testing.assert_close(out.cpu(), silu_mul_oracle(gate_up), rtol=RTOL, atol=1e-30)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_silu_mul_at_the_ends_of_the_range(backend: Backend) -> None:
    """e^200 overflows float32: silu(−200) is −0, not NaN, and silu(200) is 200."""
    out = backend.silu_mul(torch.tensor([[-200.0, 200.0, 3.0, 3.0]], device=DEVICE))
    assert out.cpu().tolist() == [[0.0, 600.0]]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (2, 1, 24)])
def test_rope_and_store(backend: Backend, rng: torch.Generator, heads: int, kv_heads: int, head_dim: int) -> None:
    """Views of one qkv tensor; positions and slots in no order; untouched slots keep their sentinel."""
    num_rows, block_size, num_blocks = 5, 4, 6
    widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    qkv = torch.randn(num_rows, sum(widths), generator=rng)
    angles = torch.rand(100, head_dim // 2, generator=rng) * 7
    cos, sin = angles.cos(), angles.sin()
    positions = torch.tensor([99, 0, 7, 8, 31])
    slots = torch.tensor([23, 5, 6, 0, 17])
    q, k, v = (part.view(num_rows, -1, head_dim) for part in qkv.split(widths, dim=1))

    inside = qkv.to(DEVICE, copy=True)
    q_view, k_view, v_view = (part.view(num_rows, -1, head_dim) for part in inside.split(widths, dim=1))
    k_cache = torch.full((num_blocks, block_size, kv_heads, head_dim), SENTINEL, device=DEVICE)
    v_cache = k_cache.clone()
    backend.rope_and_store(
        q_view, k_view, v_view, cos.to(DEVICE), sin.to(DEVICE), positions.to(DEVICE), k_cache, v_cache,
        slots.to(DEVICE),
    )  # fmt: skip

    k_expected = rope_oracle(k, cos, sin, positions)
    close = {"rtol": 0, "atol": 4 * 8 * UNIT_ROUNDOFF}  # two products of numbers below 5 · 1 and a sum
    torch.testing.assert_close(q_view.cpu(), rope_oracle(q, cos, sin, positions), **close)
    torch.testing.assert_close(k_view.cpu(), k_expected, **close)
    assert torch.equal(v_view.cpu(), v)
    k_slots, v_slots = (cache.cpu().view(-1, kv_heads, head_dim) for cache in (k_cache, v_cache))
    assert torch.equal(k_slots[slots], k_view.cpu())
    assert torch.equal(v_slots[slots], v)
    untouched = torch.ones(num_blocks * block_size, dtype=torch.bool)
    untouched[slots] = False
    assert (k_slots[untouched] == SENTINEL).all()
    assert (v_slots[untouched] == SENTINEL).all()


def test_a_row_of_padding_is_stored_nowhere(triton_backend: Backend, rng: torch.Generator) -> None:
    """Slot −1 beside live rows: no block changes but theirs, not even the last one of the cache or the first."""
    q, k, v = torch.randn(3, 3, 2, 16, generator=rng).to(DEVICE)
    cos = sin = torch.ones(8, 8, device=DEVICE)
    caches = [torch.full((3, 4, 2, 16), SENTINEL, device=DEVICE) for _ in range(2)]
    slots = torch.tensor([5, -1, -1], device=DEVICE)
    triton_backend.rope_and_store(q, k, v, cos, sin, torch.tensor([3, 0, 0], device=DEVICE), *caches, slots)
    for cache in caches:
        written = (cache.view(12, -1) != SENTINEL).any(dim=1).nonzero().flatten()
        assert written.tolist() == [5]


def test_no_rows_is_no_work(backend: Backend) -> None:
    nothing = torch.empty(0, 8, device=DEVICE)
    weight = torch.ones(8, device=DEVICE)
    assert backend.rms_norm(nothing, weight, 1e-5).shape == (0, 8)
    assert backend.add_rms_norm(nothing, nothing.clone(), weight, 1e-5).shape == (0, 8)
    assert backend.silu_mul(nothing).shape == (0, 4)

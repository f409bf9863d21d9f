"""Rotary position embedding of q and k, and the store of k and v into the paged cache, in one launch.

    for the halves (a, b) of a head's vector:   a' = a · cos − b · sin      b' = b · cos + a · sin
    k_cache[slot] = k'      v_cache[slot] = v        slot = block · BS + offset

q [T, H, D], k, v [T, Hkv, D] in the compute dtype, rotated in place; cos, sin float32 [max positions, D/2], row
`positions[t]`. Hugging Face's half-split layout (`rotate_half`), not the interleaved one of the paper
(arXiv:2104.09864). A row with a negative slot is padding: it is stored nowhere.
CPU paths (without padding): `eager_backend.EagerBackend` and `native/`. Oracle: `rope_oracle`.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
from torch import Tensor

from perseid_kernels._triton import power_of_two, tl, triton


@triton.jit
def rotate(x, offset_HD, cos_D, sin_D, HALF: tl.constexpr, mask_HD):
    """Rotate [heads, D] in place and return the two halves in float32."""
    a = tl.load(x + offset_HD, mask=mask_HD, other=0.0).to(tl.float32)
    b = tl.load(x + offset_HD + HALF, mask=mask_HD, other=0.0).to(tl.float32)
    a_new = a * cos_D[None, :] - b * sin_D[None, :]
    b_new = b * cos_D[None, :] + a * sin_D[None, :]
    tl.store(x + offset_HD, a_new.to(x.dtype.element_ty), mask=mask_HD)
    tl.store(x + offset_HD + HALF, b_new.to(x.dtype.element_ty), mask=mask_HD)
    return a_new, b_new


@triton.jit
def rope_and_store_kernel(
    q,
    k,
    v,
    cos,
    sin,
    positions,  # int64 [T]
    k_cache,  # [NB · BS, Hkv, D]
    v_cache,
    slots,  # int64 [T], negative: store nothing
    stride_q,
    stride_k,
    stride_v,
    H: tl.constexpr,
    HKV: tl.constexpr,
    HALF: tl.constexpr,  # D / 2
    BLOCK_H: tl.constexpr,
    BLOCK_HKV: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """One program a row."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_HALF)
    live_d = d < HALF
    angle = tl.load(positions + t) * HALF + d
    cos_D = tl.load(cos + angle, mask=live_d, other=0.0)
    sin_D = tl.load(sin + angle, mask=live_d, other=0.0)

    head = tl.arange(0, BLOCK_H)
    offset = head[:, None] * 2 * HALF + d[None, :]
    rotate(q + t * stride_q, offset, cos_D, sin_D, HALF, (head < H)[:, None] & live_d[None, :])

    kv_head = tl.arange(0, BLOCK_HKV)
    offset = kv_head[:, None] * 2 * HALF + d[None, :]
    mask = (kv_head < HKV)[:, None] & live_d[None, :]
    k_low, k_high = rotate(k + t * stride_k, offset, cos_D, sin_D, HALF, mask)
    v_row = v + t * stride_v
    v_low = tl.load(v_row + offset, mask=mask, other=0.0)
    v_high = tl.load(v_row + offset + HALF, mask=mask, other=0.0)
    slot = tl.load(slots + t)
    stored = mask & (slot >= 0)
    base = slot * HKV * 2 * HALF
    dtype = k_cache.dtype.element_ty
    tl.store(k_cache + base + offset, k_low.to(dtype), mask=stored)
    tl.store(k_cache + base + offset + HALF, k_high.to(dtype), mask=stored)
    tl.store(v_cache + base + offset, v_low.to(dtype), mask=stored)
    tl.store(v_cache + base + offset + HALF, v_high.to(dtype), mask=stored)


def rope_and_store(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    cos_XD: Tensor,
    sin_XD: Tensor,
    positions_T: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots_T: Tensor,
) -> None:
    """Rotate q and k in place, store k and v where the slot is not negative. q, k, v may be views of one qkv tensor;
    caches are contiguous."""
    num_rows, num_heads, head_dim = q_THD.shape
    if num_rows == 0:
        return
    num_kv_heads = k_THD.shape[1]
    rope_and_store_kernel[(num_rows,)](
        q_THD,
        k_THD,
        v_THD,
        cos_XD,
        sin_XD,
        positions_T,
        k_cache,
        v_cache,
        slots_T,
        q_THD.stride(0),
        k_THD.stride(0),
        v_THD.stride(0),
        H=num_heads,
        HKV=num_kv_heads,
        HALF=head_dim // 2,
        BLOCK_H=power_of_two(num_heads),
        BLOCK_HKV=power_of_two(num_kv_heads),
        BLOCK_HALF=power_of_two(head_dim // 2),
        num_warps=4,
    )


def rope_oracle(x_THD: Tensor, cos_XD: Tensor, sin_XD: Tensor, positions_T: Tensor) -> Tensor:
    """The rotation in float32, written with complex numbers: (a + ib) · e^{iφ}."""
    half = x_THD.shape[-1] // 2
    vectors = torch.complex(x_THD[..., :half].float(), x_THD[..., half:].float())
    turn = torch.complex(cos_XD[positions_T].float(), sin_XD[positions_T].float())
    rotated = vectors * turn[:, None, :]
    return torch.cat((rotated.real, rotated.imag), dim=-1)

"""RMS norm, alone and with the residual sum before it.

    rms_norm(x) = x / sqrt(mean(x²) + eps) · weight            add_rms_norm: residual += x, then rms_norm(residual)

x [.., N] in the compute dtype; mean, root and product in float32, rounded once at the end (the residual sum is
rounded to the residual's dtype before it is normed, as a later layer will read it).
CPU paths: `eager_backend.EagerBackend` and `native/`. Oracle: `rms_norm_oracle`.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
from torch import Tensor

from perseid_kernels._triton import power_of_two, tl, triton


@triton.jit
def rms_norm_kernel(
    x,  # [T, H, N]; a plain [T, N] has H = 1
    residual,  # [T, N], updated where ADD
    weight,  # [N]
    out,  # [T, H, N] contiguous
    eps,
    N,
    stride_t,
    stride_h,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    n = tl.arange(0, BLOCK)
    live = n < N
    value = tl.load(x + t * stride_t + h * stride_h + n, mask=live, other=0.0).to(tl.float32)
    if ADD:
        held = tl.load(residual + t * N + n, mask=live, other=0.0).to(tl.float32)
        summed = (value + held).to(residual.dtype.element_ty)
        tl.store(residual + t * N + n, summed, mask=live)
        value = summed.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / N + eps)
    result = value * inverse * tl.load(weight + n, mask=live, other=0.0).to(tl.float32)
    out_row = out + (t * tl.num_programs(1) + h) * N
    tl.store(out_row + n, result.to(out.dtype.element_ty), mask=live)


def rms_norm(x: Tensor, weight_N: Tensor, eps: float) -> Tensor:
    """Norm over the last dimension of [T, N] or [T, H, N] (which may be a strided view); a new tensor."""
    heads = x if x.dim() == 3 else x.unsqueeze(1)
    return _launch(heads, None, weight_N, eps).view(x.shape)


def add_rms_norm(x_TN: Tensor, residual_TN: Tensor, weight_N: Tensor, eps: float) -> Tensor:
    """residual += x in place; the norm of the sum."""
    return _launch(x_TN.unsqueeze(1), residual_TN, weight_N, eps).view(x_TN.shape)


def _launch(x_THN: Tensor, residual_TN: Tensor | None, weight_N: Tensor, eps: float) -> Tensor:
    num_rows, num_heads, width = x_THN.shape
    out = torch.empty(x_THN.shape, dtype=x_THN.dtype, device=x_THN.device)
    if num_rows == 0:
        return out
    block = power_of_two(width)
    rms_norm_kernel[(num_rows, num_heads)](
        x_THN,
        x_THN if residual_TN is None else residual_TN,
        weight_N,
        out,
        eps,
        width,
        x_THN.stride(0),
        x_THN.stride(1),
        ADD=residual_TN is not None,
        BLOCK=block,
        num_warps=max(1, min(8, block // 512)),
    )
    return out


def rms_norm_oracle(x: Tensor, weight_N: Tensor, eps: float) -> Tensor:
    """The norm in float32 by the definition."""
    value = x.float()
    return value / torch.sqrt(value.pow(2).mean(-1, keepdim=True) + eps) * weight_N.float()

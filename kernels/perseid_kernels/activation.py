"""The gated activation of a Llama-shaped MLP.

    out[t, f] = silu(x[t, f]) · x[t, F + f]          silu(g) = g / (1 + e^−g)

x [T, 2F] (gate and up side by side), out [T, F]; computed in float32, rounded once.
CPU paths: `eager_backend.EagerBackend` and `native/`. Oracle: `silu_mul_oracle`.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
from torch import Tensor

from perseid_kernels._triton import cdiv, tl, triton

_BLOCK = 1024


@triton.jit
def silu_mul_kernel(x, out, F, stride_x, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = f < F
    gate = tl.load(x + t * stride_x + f, mask=live, other=0.0).to(tl.float32)
    up = tl.load(x + t * stride_x + F + f, mask=live, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + t * F + f, result.to(out.dtype.element_ty), mask=live)


def silu_mul(gate_up_T2F: Tensor) -> Tensor:
    """silu(first half of the columns) · second half: a new [T, F]."""
    num_rows, width = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    out = torch.empty((num_rows, width), dtype=gate_up_T2F.dtype, device=gate_up_T2F.device)
    if num_rows:
        silu_mul_kernel[(num_rows, cdiv(width, _BLOCK))](
            gate_up_T2F, out, width, gate_up_T2F.stride(0), BLOCK=_BLOCK, num_warps=4
        )
    return out


def silu_mul_oracle(gate_up_T2F: Tensor) -> Tensor:
    """silu(gate) · up in float32 by the definition."""
    gate, up = gate_up_T2F.float().chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up

"""The product with a weight kept in 16 or 32 bits (an output head or embedding that was not quantised).

    out[t, o] = Σ_i x[t, i] · W[o, i]

x [T, K] and out [T, N] in the compute dtype, W rounded to it at load, summed in float32. cuBLAS would be faster on
long prefills, but picks its kernel, and with it the order of the sum, by the number of rows; here a row's product
is the same in any batch (see `matmul_common.py`), and an output head sees only the rows whose logits are wanted.

CPU paths: `eager_backend.EagerBackend.matmul` and `native/`. Oracle: `matmul_dense_oracle`.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from dataclasses import dataclass

import torch
from torch import Tensor

from perseid_kernels._triton import tl, triton
from perseid_kernels.matmul_common import choose_config, grid_of, parts_or_out, reduce_parts, store_tile
from perseid_kernels.weights import DenseWeight

_BLOCK_K = 64


@dataclass(frozen=True, slots=True)
class PackedDense:
    """A DenseWeight on the device."""

    values: Tensor  # compute dtype [N, K]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)"""
        return self.values.shape[0], self.values.shape[1]

    @property
    def nbytes(self) -> int:
        """Device bytes held."""
        return self.values.nbytes


def pack_dense(weight: DenseWeight, device: torch.device, compute_dtype: torch.dtype) -> PackedDense:
    """Move to the device in the compute dtype (rounded once)."""
    return PackedDense(weight.values.to(device=device, dtype=compute_dtype).contiguous())


@triton.jit
def matmul_dense_kernel(
    x,  # [T, K]
    w,  # [N, K]
    out,  # [T, N], or float32 [SPLITS, T, N] where PARALLEL
    T,
    N,
    K,
    stride_x,
    stride_out,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    PARALLEL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    j = tl.arange(0, BLOCK_K)
    live_n = (n < N)[:, None]
    live_t = (t < T)[None, :]
    w_rows = w + n.to(tl.int64)[:, None] * K
    x_rows = x + t.to(tl.int64)[None, :] * stride_x

    blocks = tl.cdiv(K, BLOCK_K)
    blocks_in_split = tl.cdiv(blocks, SPLITS)
    first_split = tl.program_id(2)
    last_split = first_split + 1 if PARALLEL else SPLITS
    total = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
    for split in range(first_split, last_split):
        acc = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
        for block in range(split * blocks_in_split, tl.minimum((split + 1) * blocks_in_split, blocks)):
            k = block * BLOCK_K + j
            w_NK = tl.load(w_rows + k[None, :], mask=live_n & (k < K)[None, :], other=0.0)
            x_KT = tl.load(x_rows + k[:, None], mask=live_t & (k < K)[:, None], other=0.0)
            acc = tl.dot(w_NK, x_KT, acc, input_precision="ieee")
        total += acc
    store_tile(out, total, n, t, first_split, N, T, stride_out, PARALLEL)


def matmul_dense(x_TK: Tensor, weight: PackedDense, out_TN: Tensor) -> None:
    """out = x Wᵀ. x has contiguous rows; `out` may be a column slice of a wider row-major tensor."""
    num_outputs, num_inputs = weight.shape
    num_rows = x_TK.shape[0]
    if num_rows == 0:
        return
    config = choose_config(num_outputs, num_inputs, num_rows)
    target = parts_or_out(config, out_TN)
    matmul_dense_kernel[grid_of(config, num_outputs, num_rows)](
        x_TK,
        weight.values,
        target,
        num_rows,
        num_outputs,
        num_inputs,
        x_TK.stride(0),
        out_TN.stride(0),
        BLOCK_K=_BLOCK_K,
        SPLITS=config.splits,
        PARALLEL=config.parallel,
        BLOCK_N=config.block_n,
        BLOCK_T=config.block_t,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    reduce_parts(config, target, out_TN)


def matmul_dense_oracle(x_TK: Tensor, weight: DenseWeight) -> Tensor:
    """x Wᵀ in float32 by the definition."""
    return x_TK.float() @ weight.dequantize().T

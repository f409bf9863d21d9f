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
from perseid_kernels.devices import device_class
from perseid_kernels.matmul_common import (
    choose_config,
    grid_of,
    inputs_of_split,
    parts_or_out,
    reduce_parts,
    store_tile,
)
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
def sum_split_dense(
    x_rows,  # pointers to the rows of x [1, BLOCK_T]
    w_rows,  # pointers to the rows of W [BLOCK_N, 1]
    live_t,  # [1, BLOCK_T]
    live_n,  # [BLOCK_N, 1]
    K,
    first_k,
    end_k,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Σ over inputs [first_k, end_k): float32 [BLOCK_N, BLOCK_T]."""
    acc = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
    for start in range(first_k, end_k, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask_n = live_n if EVEN_K else live_n & (k < K)[None, :]
        mask_t = live_t if EVEN_K else live_t & (k < K)[:, None]
        w_NK = tl.load(w_rows + k[None, :], mask=mask_n, other=0.0)
        x_KT = tl.load(x_rows + k[:, None], mask=mask_t, other=0.0)
        acc = tl.dot(w_NK, x_KT, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["T"])  # every batch size by the same code
def matmul_dense_kernel(
    x,  # [T, K]
    w,  # [N, K]
    out,  # [T, N], or float32 [SPLITS, T, N] where PARALLEL
    T,
    N,
    K,
    stride_x,
    stride_out,
    split_k,  # inputs in one split, a multiple of BLOCK_K
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    SPLITS: tl.constexpr,
    PARALLEL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_t = tl.program_id(0) * BLOCK_T
    t = first_t + tl.arange(0, BLOCK_T)
    live_n = (n < N)[:, None]
    live_t = (t < T)[None, :]
    w_rows = w + n.to(tl.int64)[:, None] * K
    x_rows = x + t.to(tl.int64)[None, :] * stride_x
    first = tl.program_id(2) if PARALLEL else 0
    total = sum_split_dense(
        x_rows, w_rows, live_t, live_n, K, first * split_k, tl.minimum((first + 1) * split_k, K),
        EVEN_K, BLOCK_N, BLOCK_T, BLOCK_K,
    )  # fmt: skip
    if not PARALLEL:
        for split in range(1, SPLITS):
            total += sum_split_dense(
                x_rows, w_rows, live_t, live_n, K, split * split_k, tl.minimum((split + 1) * split_k, K),
                EVEN_K, BLOCK_N, BLOCK_T, BLOCK_K,
            )  # fmt: skip
    store_tile(out, total, n, first_t, first, N, T, stride_out, PARALLEL)


def matmul_dense(x_TK: Tensor, weight: PackedDense, out_TN: Tensor) -> None:
    """out = x Wᵀ. x has contiguous rows; `out` may be a column slice of a wider row-major tensor."""
    num_outputs, num_inputs = weight.shape
    num_rows = x_TK.shape[0]
    if num_rows == 0:
        return
    config = choose_config(num_outputs, num_inputs, num_rows, device_class(x_TK.device))
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
        inputs_of_split(num_outputs, num_inputs, _BLOCK_K),
        EVEN_K=num_inputs % _BLOCK_K == 0,
        BLOCK_K=_BLOCK_K,
        **config.constants(),
        **config.launch(),
    )
    reduce_parts(config, target, out_TN)


def matmul_dense_oracle(x_TK: Tensor, weight: DenseWeight) -> Tensor:
    """x Wᵀ in float32 by the definition."""
    return x_TK.float() @ weight.dequantize().T

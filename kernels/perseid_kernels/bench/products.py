"""The 4-bit product for each shape and number of rows: against the bytes floor, and against a bf16 product."""

import torch

from perseid_kernels.bench.roofline import LLAMA_8B, ModelShape, Rates, matmul_work
from perseid_kernels.bench.sections import Deadline, Report, Row, points
from perseid_kernels.bench.timing import seconds
from perseid_kernels.bench.weights import random_packed_int4
from perseid_kernels.matmul_q4 import PackedInt4, matmul_q4

ROWS = (1, 16, 256, 4, 64, 1024, 4096)  # those with a target first
_COLD_BYTES = 256 << 20  # weights that are read in turn, so that none is found in a cache


def bench_products(
    report: Report,
    deadline: Deadline,
    rates: Rates,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    shape: ModelShape = LLAMA_8B,
    rows: tuple[int, ...] = ROWS,
    cold_bytes: int = _COLD_BYTES,
) -> None:
    """Targets: ≤ 1.25 × the bytes floor at 1–16 rows; ≥ 60 % of the bf16 rate at ≥ 256 rows."""
    shapes = [(sum(slices), inputs, name) for name, (inputs, slices) in shape.linears().items()]
    wanted = [(*linear, affine, count) for count in rows for affine in (True, False) for linear in shapes]
    for outputs, inputs, name, affine, num_rows in points(report, deadline, wanted):
        weight = random_packed_int4(outputs, inputs, 32 if affine else 64, device, affine=affine)
        x = torch.randn(num_rows, inputs, device=device).to(dtype)
        row = _point(weight, x, rates, device, cold_bytes)
        report.rows.append({"linear": name, "weight": "affine/32" if affine else "nf4/64", **row})


def _point(weight: PackedInt4, x: torch.Tensor, rates: Rates, device: torch.device, cold_bytes: int) -> Row:
    (outputs, inputs), num_rows = weight.shape, x.shape[0]
    out = torch.empty(num_rows, outputs, dtype=x.dtype, device=device)
    copies = max(1, min(16, cold_bytes // weight.nbytes))
    held = [weight, *(_copy(weight) for _ in range(copies - 1))]

    def run() -> None:
        for one in held:
            matmul_q4(x, one, out)

    taken = seconds(run, device) / copies
    work = matmul_work(num_rows, outputs, inputs, weight.nbytes, x.element_size())
    dense = _dense_seconds(x, outputs, device, cold_bytes)
    rate = work.flops / taken
    return {
        "N": outputs,
        "K": inputs,
        "rows": num_rows,
        "µs": taken * 1e6,
        "floor µs": work.floor(rates) * 1e6,
        "bound": work.bound(rates),
        "× floor": taken / work.floor(rates),
        "GB/s": work.bytes / taken / 1e9,
        "TFLOP/s": rate / 1e12,
        "of matmul rate": rate / rates.flops,
        "bf16 µs": dense * 1e6,
        "× bf16": taken / dense,
        "target met": product_target_met(num_rows, taken / work.floor(rates), rate / rates.flops),
    }


def product_target_met(num_rows: int, of_floor: float, of_rate: float) -> bool | None:
    """None where there is no target (17–255 rows)."""
    if num_rows <= 16:
        return of_floor <= 1.25
    return of_rate >= 0.6 if num_rows >= 256 else None


def _copy(weight: PackedInt4) -> PackedInt4:
    scale = weight.scale.clone()
    return PackedInt4(
        weight.codes.clone(), weight.codebook, scale, weight.offset, weight.group_size, weight.num_inputs, weight.zero
    )


def _dense_seconds(x: torch.Tensor, outputs: int, device: torch.device, cold_bytes: int) -> float:
    """The vendor's library on a weight in the compute dtype, cold as well."""
    first = torch.randn(x.shape[1], outputs, device=device).to(x.dtype)
    held = [first, *(first.clone() for _ in range(max(1, min(8, cold_bytes // first.nbytes)) - 1))]
    out = torch.empty(x.shape[0], outputs, dtype=x.dtype, device=device)

    def run() -> None:
        for one in held:
            torch.mm(x, one, out=out)

    return seconds(run, device) / len(held)

"""Each op against its roofline, on the backend this machine gets.

    python -m perseid_kernels.bench.kernels [--seconds 120] [--out build/kernel-bench.json]

On the CPU: the native library on SmolLM2-135M's shapes, against a measured read bandwidth and float32 matrix rate.
Weights and rank pages are read in turn from several copies, as a step reads those of its layers: from memory.
On a GPU: the Triton kernels on an 8B model's shapes.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from perseid_kernels.backend import Backend, backend_for
from perseid_kernels.bench.lora import page_lists
from perseid_kernels.bench.rates import measure_rates
from perseid_kernels.bench.report import lines_of, machine, write_json
from perseid_kernels.bench.roofline import (
    LLAMA_8B,
    SMOLLM2_135M,
    ModelShape,
    Rates,
    Work,
    attention_work,
    lora_parameters,
    lora_work,
    matmul_work,
)
from perseid_kernels.bench.sections import Deadline, Report, Section, points, run_sections
from perseid_kernels.bench.step import build_inputs
from perseid_kernels.bench.timing import seconds
from perseid_kernels.bench.weights import random_int4, random_pages
from perseid_kernels.segments import Segments
from perseid_kernels.weights import Int8Weight, Weight

ROWS = (1, 4, 16, 64, 512)
_COLD_BYTES = 96 << 20


@dataclass(frozen=True, slots=True)
class OpPoint:
    """One op at one size: what it cannot avoid, and how to make the inputs and run it."""

    op: str
    size: str
    rows: int
    prepare: "Callable[[], Prepared]"


@dataclass(frozen=True, slots=True)
class Prepared:
    """`run` does the op `times` times, on as many weights; `work` is that of one."""

    run: Callable[[], object]
    work: Work
    times: int = 1


def copies_of(num_bytes: int) -> int:
    """So many that going round them finds none in a cache."""
    return max(1, min(64, _COLD_BYTES // num_bytes))


def op_points(backend: Backend, device: torch.device, shape: ModelShape, rows: Sequence[int]) -> list[OpPoint]:
    """Products of every linear and of the head, low-rank sums of one and of eight adapters, attention, norms."""
    found: list[OpPoint] = []
    for count in rows:
        for name, (inputs, slices) in shape.linears().items():
            size = f"{name} {sum(slices)} × {inputs}"
            make = partial(_product, backend, device, count, sum(slices), inputs, shape.group_size)
            found.append(OpPoint("4-bit product", size, count, make))
            for adapters in (1, 8):
                if adapters <= count:
                    make = partial(_low_rank, backend, device, count, inputs, slices, adapters)
                    found.append(OpPoint("low rank", f"{name}, {adapters} × r16", count, make))
        if count <= 64:
            head = partial(_head, backend, device, count, shape.vocabulary, shape.hidden)
            found.append(OpPoint("8-bit product", f"head {shape.vocabulary} × {shape.hidden}", count, head))
            found.append(
                OpPoint("attention", "context 512", count, partial(_attention, backend, device, count, 512, shape))
            )
        found.append(OpPoint("norm", str(shape.hidden), count, partial(_norm, backend, device, count, shape.hidden)))
    return found


def bench_ops(report: Report, deadline: Deadline, rates: Rates, device: torch.device, wanted: list[OpPoint]) -> None:
    """A row for each point."""
    for point in points(report, deadline, wanted):
        prepared = point.prepare()
        taken, work = seconds(prepared.run, device, budget=0.1) / prepared.times, prepared.work
        report.rows.append(
            {
                "op": point.op,
                "size": point.size,
                "rows": point.rows,
                "µs": taken * 1e6,
                "floor µs": work.floor(rates) * 1e6,
                "bound": work.bound(rates),
                "× floor": taken / work.floor(rates),
                "GB/s": work.bytes / taken / 1e9,
                "GFLOP/s": work.flops / taken / 1e9,
            }
        )


def _rows(backend: Backend, device: torch.device, num_rows: int, width: int) -> torch.Tensor:
    return torch.randn(num_rows, width, device=device).to(backend.compute_dtype)


def _product(backend: Backend, device: torch.device, num_rows: int, outputs: int, inputs: int, group: int) -> Prepared:
    weight = random_int4(torch.Generator().manual_seed(0), outputs, inputs, group, affine=True)
    return _matmul(backend, device, num_rows, weight)


def _head(backend: Backend, device: torch.device, num_rows: int, outputs: int, inputs: int) -> Prepared:
    codes = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
    return _matmul(backend, device, num_rows, Int8Weight(codes, torch.full((outputs, inputs // 32), 1e-3), 32))


def _matmul(backend: Backend, device: torch.device, num_rows: int, weight: Weight) -> Prepared:
    outputs, inputs = weight.shape
    held: list[Any] = [backend.pack(weight, device)]
    held += [backend.pack(weight, device) for _ in range(copies_of(held[0].nbytes) - 1)]
    x = _rows(backend, device, num_rows, inputs)
    out = torch.empty(num_rows, outputs, dtype=x.dtype, device=device)

    def run() -> None:
        for packed in held:
            backend.matmul(x, packed, out)

    work = matmul_work(num_rows, outputs, inputs, int(held[0].nbytes), x.element_size())
    return Prepared(run, work, len(held))


def _low_rank(
    backend: Backend, device: torch.device, num_rows: int, inputs: int, slices: tuple[int, ...], adapters: int
) -> Prepared:
    segments = Segments.build(page_lists(num_rows, 16, adapters), device)
    assert segments is not None
    x = _rows(backend, device, num_rows, inputs)
    out = torch.zeros(num_rows, sum(slices), dtype=x.dtype, device=device)
    num_bytes = adapters * lora_parameters(inputs, slices, 16) * x.element_size()
    held = [random_pages(adapters, inputs, slices, device, backend.compute_dtype) for _ in range(copies_of(num_bytes))]

    def run() -> None:
        for pages in held:
            backend.add_lora(x, pages, segments, out)

    return Prepared(run, lora_work(num_rows, inputs, slices, 16, adapters, x.element_size()), len(held))


def _attention(backend: Backend, device: torch.device, num_rows: int, context: int, shape: ModelShape) -> Prepared:
    inputs = build_inputs(shape, num_rows, context, None, device, backend.compute_dtype, layers=1)
    q = _rows(backend, device, num_rows, shape.heads * shape.head_dim).view(num_rows, shape.heads, shape.head_dim)
    out = torch.empty_like(q)
    item = q.element_size()
    work = attention_work(num_rows, context, shape.heads, shape.kv_heads, shape.head_dim, item, item)
    return Prepared(lambda: backend.attention(q, *inputs.caches[0], inputs.batch, 0.1, out), work)


def _norm(backend: Backend, device: torch.device, num_rows: int, width: int) -> Prepared:
    x, residual = _rows(backend, device, num_rows, width), _rows(backend, device, num_rows, width)
    weight = torch.ones(width, device=device).to(backend.compute_dtype)
    work = Work(num_rows * width * x.element_size() * 4, num_rows * width * 5)
    return Prepared(lambda: backend.add_rms_norm(x, residual, weight, 1e-5), work)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 when a section failed."""
    parser = argparse.ArgumentParser(prog="python -m perseid_kernels.bench.kernels", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="budget of the whole (default 120)")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="numbers of rows")
    parser.add_argument("--out", type=Path, default=Path("build/kernel-bench.json"), help="where the JSON goes")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend = backend_for(device)
    shape = LLAMA_8B if device.type == "cuda" else SMOLLM2_135M
    facts = {**machine(device), "backend": backend.name}
    rates = measure_rates(device)
    unit = f"{rates.bandwidth / 1e9:.0f} GB/s, {rates.flops / 1e9:.0f} GFLOP/s"
    facts |= {"bandwidth": rates.bandwidth, "flops": rates.flops}
    sys.stdout.write(f"{facts['processor']}, {facts['device']}, backend {backend.name}, {unit}\n\n")

    def run(report: Report, deadline: Deadline) -> None:
        bench_ops(report, deadline, rates, device, op_points(backend, device, shape, options.rows))

    def on_report(reports: list[Report]) -> None:
        sys.stdout.write("\n".join(lines_of(reports[-1])) + "\n")
        write_json(options.out, facts, reports)

    reports = run_sections([Section("ops against their rooflines", options.seconds, run)], options.seconds, on_report)
    return 1 if any(report.failed for report in reports) else 0


if __name__ == "__main__":
    raise SystemExit(main())

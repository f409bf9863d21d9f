"""The whole GPU suite in one command.

    python -m perseid_kernels.bench.gpu [--seconds 500] [--out build/gpu-bench.json]

Needs a GPU, torch, Triton and NumPy; no network. Order: the device's own rates; each kernel against its oracle (a
wrong one ends the suite with exit code 1); the decode step; steps with drafted trees; the 4-bit product; the low-rank
sums, by name and routed.
Each section has a budget; what did not fit is noted. Results are written after every section, so a stopped run keeps
its own.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from perseid_kernels.bench.checks import run_checks
from perseid_kernels.bench.lora import bench_lora
from perseid_kernels.bench.products import bench_products
from perseid_kernels.bench.rates import measure_rates
from perseid_kernels.bench.report import lines_of, machine, write_json
from perseid_kernels.bench.roofline import Rates
from perseid_kernels.bench.routed import bench_routed
from perseid_kernels.bench.sections import Deadline, Report, Section, run_sections
from perseid_kernels.bench.step import bench_step
from perseid_kernels.bench.trees import bench_trees

TOTAL_SECONDS = 500.0
"""Nine minutes with a margin: a point that has begun is finished, and its kernels compiled, beyond the deadline."""


class _Measured:
    """The rates, known once their section has run."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._rates: Rates | None = None

    def section(self, report: Report, _deadline: Deadline) -> None:
        rates = self.rates()
        report.rows.append({"copy GB/s": rates.bandwidth / 1e9, "bf16 TFLOP/s": rates.flops / 1e12})

    def rates(self) -> Rates:
        if self._rates is None:
            self._rates = measure_rates(self.device)
        return self._rates


def sections_for(device: torch.device, share: float = 1.0) -> list[Section]:
    """The suite; `share` scales the budgets, which add up to less than TOTAL_SECONDS."""
    measured = _Measured(device)

    def step(report: Report, deadline: Deadline) -> None:
        bench_step(report, deadline, measured.rates(), device)

    def products(report: Report, deadline: Deadline) -> None:
        bench_products(report, deadline, measured.rates(), device)

    def lora(report: Report, deadline: Deadline) -> None:
        bench_lora(report, deadline, measured.rates(), device)

    def routed(report: Report, deadline: Deadline) -> None:
        bench_routed(report, deadline, measured.rates(), device)

    return [
        Section("rates of the device", 20 * share, measured.section),
        Section("kernels against their oracles", 130 * share, partial(run_checks, device=device)),
        Section("decode step of an 8B-shaped model", 130 * share, step),
        Section("steps with drafted trees", 65 * share, partial(bench_trees, device=device)),
        Section("4-bit product", 70 * share, products),
        Section("shrink + expand", 60 * share, lora),
        Section("routed sums", 25 * share, routed),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 when a section failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m perseid_kernels.bench.gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="budget of the whole (default 500)")
    parser.add_argument("--out", type=Path, default=Path("build/gpu-bench.json"), help="where the JSON goes")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.stderr.write("no GPU: torch.cuda.is_available() is false; nothing was measured\n")
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    facts = machine(device)
    sys.stdout.write(f"{facts['device']}, torch {facts['torch']}\n\n")

    def on_report(reports: list[Report]) -> None:
        sys.stdout.write("\n".join(lines_of(reports[-1])) + "\n")
        sys.stdout.flush()
        write_json(options.out, facts, reports)
        torch.cuda.empty_cache()

    reports = run_sections(sections_for(device, options.seconds / TOTAL_SECONDS), options.seconds, on_report)
    return 1 if any(report.failed for report in reports) else 0


if __name__ == "__main__":
    raise SystemExit(main())

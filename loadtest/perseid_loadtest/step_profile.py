"""Where each millisecond of a decode step goes, on a CPU.

    make profile                     # base, one adapter and mixed adapters at 1, 4 and 16 requests
    make profile ARGS="--batches 8"

Runs the engine in this process, as `inprocess` does, on the benchmark's workload, and lets the native library count
the time of each op. What is left of a step is Python: scheduling, sampling, messages.
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from perseid_kernels.native.backend import NativeBackend
from perseid_kernels.native.build import build_library
from perseid_kernels.native.profile import OPS, Profile
from perseid_loadtest.inprocess import Loaded, load_engine, submit
from perseid_loadtest.offline import example_adapters
from perseid_loadtest.report import machine
from perseid_loadtest.workload import KINDS, Case, Workload
from perseid_server.engine.config import EngineConfig

OUTSIDE = "outside the pass"
PROMPT, TOKENS = 64, 64


@dataclass(frozen=True, slots=True)
class StepProfile:
    """Medians over the steps in which every request decodes."""

    case: Case
    step_ms: float
    op_ms: Mapping[str, float]

    @property
    def outside_ms(self) -> float:
        """What is not in the forward pass."""
        return self.step_ms - sum(self.op_ms.values())


def profile_case(loaded: Loaded, profile: Profile, workload: Workload, case: Case) -> StepProfile:
    """Run the case's requests to their end."""
    submit(loaded, workload.jobs(case, turn=0))
    steps: list[float] = []
    ops: list[dict[str, float]] = []
    while loaded.engine.has_work:
        profile.reset()
        started = time.perf_counter()
        outputs = loaded.engine.step()
        if outputs.iteration_tokens == case.batch == len(outputs.outputs):  # all decode, none is in its prompt
            steps.append(time.perf_counter() - started)
            ops.append(profile.by_op())
    op_ms = {op: 1e3 * statistics.median(each[op] for each in ops) for op in OPS}
    return StepProfile(case, 1e3 * statistics.median(steps), op_ms)


def table_of(profiles: Sequence[StepProfile]) -> Table:
    """A column per case, a row per op."""
    table = Table(title=f"milliseconds of a decode step · {machine()}")
    table.add_column("")
    for one in profiles:
        table.add_column(f"{one.case.kind} {one.case.batch}", justify="right")
    for op in OPS:
        table.add_row(op, *(f"{one.op_ms[op]:.2f}" for one in profiles))
    table.add_row(OUTSIDE, *(f"{one.outside_ms:.2f}" for one in profiles), end_section=True)
    table.add_row("step", *(f"{one.step_ms:.2f}" for one in profiles))
    table.add_row("tokens/s", *(f"{1e3 * one.case.batch / one.step_ms:.0f}" for one in profiles))
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", action="append", metavar="NAME=FOLDER", help="default: examples/adapters/*")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="concurrent requests")
    parser.add_argument("--activations", choices=("exact", "int16", "int8"), default="exact")
    options = parser.parse_args(arguments)
    adapters = options.adapter or example_adapters()
    loaded = load_engine(adapters, EngineConfig(activations=options.activations))
    workload = Workload(PROMPT, TOKENS, tuple(loaded.versions))
    cases = [Case(kind, batch) for kind in (KINDS if adapters else KINDS[:1]) for batch in options.batches]
    with NativeBackend(build_library()).profiling() as profile:
        for case in cases:  # adapters come to the device, memory is touched
            profile_case(loaded, profile, workload, case)
        profiles = [profile_case(loaded, profile, workload, case) for case in cases]
    Console(width=max(100, 16 + 11 * len(cases))).print(table_of(profiles))


if __name__ == "__main__":
    main()

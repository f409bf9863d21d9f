"""How routing holds up as adapters grow in number: accuracy of gates and of the request-level router, and step cost.

    python examples/router_scale.py                   # N = 4, 8, 28, 64
    python examples/router_scale.py --adapters 4 8
    python examples/router_scale.py --quick           # a few training steps for N = 4, written nowhere

The first eight of N adapters are the example adapters. The others are derived from them (derived.py): they stand in
for adapters that nobody trained, one for each of the prompt families of families/. Gates are trained for minutes, not
to the end. Step costs are those of `make router-bench`: measured here, or read from a file that it wrote. The numbers
go to examples/router-scale.json as they come, and as a table into docs/routing.md.

Where other work keeps the cores busy, OMP_NUM_THREADS=1 makes this several times faster: threads that wait for one
another spin.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from derived import adapter_folders
from families import FAMILIES
from gate_trial import Budget, Trial, run_trial
from rich.console import Console
from rich.progress import Progress
from sheets import Sheet, write_between
from tasks import TASKS

from perseid_loadtest.report import machine
from perseid_loadtest.routed_step import build_stage, measure

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "routing.md"
MARK = "router-scale"
NUMBERS = (4, 8, 28, 64)
ROWS = 16
ROUNDS = 5
STEPS = 60
ROUTED = "routed, k = 2"
QUICK = Budget(steps=4, per_step=2, held_out=2, generic=8)


@dataclass(frozen=True)
class StepCost:
    """A decode step of ROWS requests of one kind, medians."""

    kind: str
    step_ms: float
    ratio: float  # to the step of requests that name an adapter


@dataclass(frozen=True)
class Scale:
    """All that was found for N adapters."""

    trained: int  # adapters; the others are derived
    trial: Trial
    costs: tuple[StepCost, ...] = ()


def budget_for(n: int) -> Budget:
    """Few samples of each adapter where there are many adapters: training takes minutes whatever n is."""
    return Budget(steps=STEPS, per_step=2 if n <= 8 else 1, held_out=max(6, min(24, 400 // n)), generic=60)


def try_out(n: int, budget: Budget, bar: Progress) -> Scale:
    """Train gates for n adapters and judge them."""
    names = list(FAMILIES)[:n]
    doing = bar.add_task(f"{n} adapters", total=budget.steps)
    with tempfile.TemporaryDirectory() as scratch:
        folders = adapter_folders(names, HERE / "adapters", Path(scratch, "adapters"))
        tasks = [FAMILIES[name] for name in names]
        trial = run_trial(tasks, folders, budget, Path(scratch, "run"), lambda done: bar.update(doing, completed=done))
    bar.remove_task(doing)
    return Scale(sum(name in TASKS for name in names), trial)


def costs_for(n: int, rounds: int, bar: Progress) -> tuple[StepCost, ...]:
    """Times of steps, of each kind of request."""
    doing = bar.add_task("", total=None)
    with tempfile.TemporaryDirectory() as scratch:
        costs = measure(build_stage(n, Path(scratch)), ROWS, rounds, lambda now: bar.update(doing, description=now))
    bar.remove_task(doing)
    return tuple(StepCost(cost.kind, cost.step_ms.median, cost.ratio.median) for cost in costs)


def costs_from(file: Path, n: int) -> tuple[StepCost, ...]:
    """Out of what `make router-bench ARGS="--json FILE"` wrote."""
    found = [cost for cost in json.loads(file.read_text())["costs"] if cost["adapters"] == n]
    return tuple(StepCost(cost["kind"], cost["step_ms"]["median"], cost["ratio"]["median"]) for cost in found)


def sheet(scales: Sequence[Scale]) -> Sheet:
    """A row for each N."""
    headings = [
        "adapters",
        "trained + derived",
        "gates right, all tokens",
        "gates right, answers",
        "tokens right by vote, answers",
        "the same, routed by themselves",
        "request router right",
        "request router wrong",
        f"step of {ROWS}, ms",
        "÷ by name",
    ]
    rows = [_row(scale) for scale in scales]
    samples = ", ".join(str(scale.trial.samples_of_adapter) for scale in scales)
    return Sheet(
        "More adapters",
        headings,
        rows,
        "Percentages of held-out items with their true answers, each column of the gates counting the same. Gates had "
        f"{scales[0].trial.steps} steps of training on {samples} samples of each adapter. Steps: random gates, k = 2.",
    )


def _row(scale: Scale) -> list[str]:
    trial = scale.trial
    cost = next((cost for cost in scale.costs if cost.kind == ROUTED), None)
    shares = (
        trial.all_tokens.decisions,
        trial.answer_tokens.decisions,
        trial.answer_tokens.votes,
        trial.routed_votes,
        trial.router_right,
        trial.router_wrong,
    )
    return [
        str(trial.n),
        f"{scale.trained} + {trial.n - scale.trained}",
        *(f"{share:.1f}" for share in shares),
        f"{cost.step_ms:.1f}" if cost else "–",
        f"{cost.ratio:.2f}" if cost else "–",
    ]


def arguments() -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--adapters", type=int, nargs="+", default=NUMBERS, metavar="N", help=f"2 to {len(FAMILIES)}")
    parser.add_argument("--costs", type=Path, help="JSON of make router-bench, instead of measuring here")
    parser.add_argument("--quick", action="store_true", help="a smoke run, written nowhere")
    parser.add_argument("--out", type=Path, help="without it, examples/router-scale.json; the document is left alone")
    return parser.parse_args()


def main() -> int:
    """Try all out, print, write."""
    args = arguments()
    console = Console()
    start = time.monotonic()
    budgets = {4: QUICK} if args.quick else {n: budget_for(n) for n in args.adapters}
    out = None if args.quick else args.out or HERE / "router-scale.json"
    scales: list[Scale] = []
    with Progress(console=console, transient=True) as bar:
        for n, budget in budgets.items():
            scales.append(try_out(n, budget, bar))
            write_numbers(out, scales, time.monotonic() - start)
        for place, n in enumerate(budgets):
            costs = costs_from(args.costs, n) if args.costs else costs_for(n, 1 if args.quick else ROUNDS, bar)
            scales[place] = replace(scales[place], costs=costs)
            write_numbers(out, scales, time.monotonic() - start)
    table = sheet(scales)
    console.print(table.in_terminal())
    if not args.quick and args.out is None:
        made = f"Made by `make router-scale` in {(time.monotonic() - start) / 60:.0f} minutes on {machine()}."
        write_between(DOCUMENT, MARK, f"{made}\n\n{table.in_markdown()}")
    return 0


def write_numbers(out: Path | None, scales: Sequence[Scale], seconds: float) -> None:
    """What there is so far."""
    if out is not None:
        found = {"machine": machine(), "seconds": round(seconds), "scales": [asdict(scale) for scale in scales]}
        out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())

"""Train the gate set of the example adapters: which of them, or the base, each token wants.

    python examples/train_gates.py                   # into examples/gates/examples; minutes on two cores
    python examples/train_gates.py --resume          # goes on after a kill

Trained on the tasks' train items, judged on their held-out items; seeds are fixed. What `perseid train gates` does
stands in the README.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from composites import training_composites
from tasks import TASKS, Item

from perseid_router.training.options import TrainingOptions
from perseid_server.cli.progress import ProgressDisplay
from perseid_server.training.config import GateTraining
from perseid_server.training.report import write_report
from perseid_server.training.run import train_gates

HERE = Path(__file__).parent
SEED = 7
STEPS = 260
COMPOSITES = 400


def write_items(path: Path, items: Sequence[Item]) -> Path:
    """Items as `perseid train gates` reads them."""
    lines = (json.dumps({"prompt": i.question, "completion": i.answer}, ensure_ascii=False) for i in items)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def write_composites(path: Path) -> Path:
    """Composite prompts of train items, with the adapter that is right piece by piece."""
    lines = (
        json.dumps({"segments": one.segments()}, ensure_ascii=False) for one in training_composites(COMPOSITES, SEED)
    )
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def recipe(out: Path, scratch: Path) -> GateTraining:
    """The training of the set that is shipped."""
    names = sorted(TASKS)
    return GateTraining(
        model="embedded",
        adapters={name: str(HERE / "adapters" / name) for name in names},
        data=(
            *((name, write_items(scratch / f"{name}.jsonl", TASKS[name].splits.train)) for name in names),
            ("composites", write_composites(scratch / "composites.jsonl")),
        ),
        held_out_share=0.05,
        held_out=tuple(
            (name, write_items(scratch / f"{name}.held.jsonl", TASKS[name].splits.held_out)) for name in names
        ),
        out=out,
        options=TrainingOptions(steps=STEPS, seed=SEED),
        samples_per_step=2,
        generic_per_step=8,
        null_weight=3.0,
        k=1,
        temperature=0.5,  # where a request asks for more than one column
        float16=True,
    )


def main() -> None:
    """Train, write the set and its report."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=HERE / "gates" / "examples")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, ProgressDisplay() as display:
        config = recipe(args.out, Path(scratch))
        options = replace(config.options, steps=args.steps)
        report = train_gates(replace(config, options=options, resume=args.resume), display.listener())
    write_report(report, args.out, plot=True)


if __name__ == "__main__":
    main()

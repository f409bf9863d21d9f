"""Train the Medusa heads that ship for the embedded base: they draft for the base and for the example adapters.

    python examples/train_heads.py                   # into examples/heads/base; under an hour on two cores
    python examples/train_heads.py --resume          # goes on after a kill

The base answers chat prompts, the example adapters their tasks' train items; what is kept to judge by elsewhere is
never seen. Seeds are fixed. What `perseid train medusa` does stands in the README.
"""

import argparse
import json
import random
import tempfile
from dataclasses import replace
from pathlib import Path

from chat import chat_prompts
from tasks import TASKS

from perseid_server.cli.progress import ProgressDisplay
from perseid_server.training.medusa.config import HeadsOptions, MedusaTraining
from perseid_server.training.medusa.report import write_report
from perseid_server.training.medusa.run import train_medusa

HERE = Path(__file__).parent
SEED = 7
CHATS = 3200
ITEMS = 400  # of each task
EPOCHS = 4.0


def write_prompts(path: Path) -> Path:
    """Chats for the base and train items for the adapters, as `perseid train medusa` reads them."""
    lines = [conversation.line() for conversation in chat_prompts(CHATS, SEED)]
    for name, task in TASKS.items():
        items = random.Random(SEED).sample(task.splits.train, ITEMS)
        lines += [json.dumps({"prompt": item.question, "adapter": name}, ensure_ascii=False) for item in items]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def recipe(out: Path, scratch: Path) -> MedusaTraining:
    """The training of the heads that are shipped."""
    return MedusaTraining(
        model="embedded",
        adapters={name: str(HERE / "adapters" / name) for name in sorted(TASKS)},
        prompts=write_prompts(scratch / "prompts.jsonl"),
        out=out,
        options=HeadsOptions(seed=SEED, epochs=EPOCHS, bfloat16=True),
        held_out_share=0.05,
        answer_tokens=120,
        max_tokens=384,
    )


def main() -> None:
    """Train, write the heads and their report."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=HERE / "heads" / "base")
    parser.add_argument("--cache", type=Path, help="keeps answers and hidden states (600 MB) for further runs")
    parser.add_argument("--epochs", type=float, default=EPOCHS)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, ProgressDisplay() as display:
        config = recipe(args.out, Path(scratch))
        options = replace(config.options, epochs=args.epochs)
        config = replace(config, options=options, cache_folder=args.cache, resume=args.resume)
        report = train_medusa(config, display.medusa_listener())
    write_report(report, args.out, plot=True)


if __name__ == "__main__":
    main()

"""Train the Medusa heads that ship for the embedded base: they draft for the base and for the example adapters.

    python examples/train_heads.py                   # into examples/heads/base; under an hour on two cores
    python examples/train_heads.py --resume          # goes on after a kill

The base answers chat prompts (written from phrasings and subjects, and asked by the base itself), the example adapters
their tasks' train items; what is kept to judge by elsewhere is never seen. Seeds are fixed. What `perseid train medusa`
does stands in the README.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from chat import Conversation, chat_prompts
from chat.questions import own_questions
from tasks import TASKS

from perseid_server.cli.progress import ProgressDisplay
from perseid_server.training.completions import CONCURRENT
from perseid_server.training.files import write_whole
from perseid_server.training.medusa.config import HeadsOptions, MedusaTraining
from perseid_server.training.medusa.report import write_report
from perseid_server.training.medusa.run import train_medusa
from perseid_server.training.workbench import open_workbench

HERE = Path(__file__).parent
SEED = 7
CHATS = 3200
QUESTIONS = 1800  # asked by the base
ITEMS = 400  # of each task
EPOCHS = 3.0


def questions(path: Path, told: Callable[[str, int, int], None]) -> list[Conversation]:
    """What the base asks, kept in a file for a resumed run."""
    if not path.is_file():
        bench = open_workbench("embedded", {}, max_rows=CONCURRENT * 256)
        asked = own_questions(bench, QUESTIONS, SEED, lambda done, count: told("asking questions", done, count))
        write_whole(path, json.dumps([conversation.turns for conversation in asked]).encode())
    return [Conversation(tuple(turns)) for turns in json.loads(path.read_bytes())]


def write_prompts(path: Path, asked: Sequence[Conversation]) -> Path:
    """Chats for the base and train items for the adapters, as `perseid train medusa` reads them."""
    lines = [conversation.line() for conversation in chat_prompts(CHATS, SEED)]
    for name, task in TASKS.items():
        items = random.Random(SEED).sample(task.splits.train, ITEMS)
        lines += [json.dumps({"prompt": item.question, "adapter": name}, ensure_ascii=False) for item in items]
    lines += [conversation.line() for conversation in asked]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def recipe(out: Path, prompts: Path) -> MedusaTraining:
    """The training of the heads that are shipped."""
    return MedusaTraining(
        model="embedded",
        adapters={name: str(HERE / "adapters" / name) for name in sorted(TASKS)},
        prompts=prompts,
        out=out,
        options=HeadsOptions(
            num_heads=4,
            num_layers=2,
            draft_vocabulary=8192,
            epochs=EPOCHS,
            learning_rate=3e-3,
            weight_decay=0.1,
            seed=SEED,
            bfloat16=True,
        ),
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
        listener = display.medusa_listener()
        asked = questions((args.cache or args.out / "checkpoint") / "questions.json", listener.told)
        config = recipe(args.out, write_prompts(Path(scratch, "prompts.jsonl"), asked))
        options = replace(config.options, epochs=args.epochs)
        config = replace(config, options=options, cache_folder=args.cache, resume=args.resume)
        report = train_medusa(config, listener)
    write_report(report, args.out, plot=True)


if __name__ == "__main__":
    main()

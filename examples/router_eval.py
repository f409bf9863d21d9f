"""Score `auto` beside all else that could answer, greedily: the base, the adapters by name, a uniform mix.

    python examples/router_eval.py                              # starts a Perseid of its own
    python examples/router_eval.py --url http://127.0.0.1:8000  # asks a running one
    python examples/router_eval.py --quick                      # a few items of everything, written nowhere

Three kinds of prompts: the held-out items of every example adapter; prompts with several problems of different tasks
(composites.py); and prompts outside all tasks, where the base's own answer is the right one. The numbers go to
examples/router-results.json, and as tables into docs/routing.md.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

from composites import SIZES, composites
from rich.console import Console
from rich.progress import Progress
from router_scores import (
    AUTO,
    GATES,
    OUTSIDE_TOKENS,
    Results,
    composite_ways,
    score_composites,
    score_outside,
    score_task,
    task_ways,
)
from router_tables import sheets
from serving import Server, own_server
from sheets import write_between
from tasks import TASKS

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "routing.md"
MARK = "router-eval"
COMPOSITE_SEED = 0
QUICK_ITEMS = 3


def outside_prompts() -> list[str]:
    """What the training of gates holds out of its generic prompts."""
    text = files("perseid_router.training").joinpath("generic_held_out.jsonl").read_text(encoding="utf-8")
    return [str(json.loads(line)["prompt"]) for line in text.splitlines()]


def evaluate(server: Server, adapters: Sequence[str], count: int, num_composites: int, bar: Progress) -> Results:
    """All prompts in all ways: `count` of each task and outside, `num_composites` of each size."""
    start = time.monotonic()
    of_tasks = [(TASKS[name], way) for name in adapters for way in task_ways(name, adapters)]
    prompts_of = {n: composites("held_out", n, num_composites, COMPOSITE_SEED) for n in SIZES}
    of_composites = [(n, way) for n in prompts_of for way in composite_ways(adapters)]
    task_scores = [score_task(server, task, way, count) for task, way in bar.track(of_tasks, description="tasks")]
    composite_scores = [
        score_composites(server, n, prompts_of[n], way) for n, way in bar.track(of_composites, description="composites")
    ]
    prompts = outside_prompts()[:count]
    bases = [reply.text for reply in server.ask(prompts, OUTSIDE_TOKENS)]
    outside = [score_outside(server, prompts, bases, way) for way in bar.track((AUTO, GATES), description="outside")]
    return Results(round(time.monotonic() - start), count, num_composites, task_scores, composite_scores, outside)


def arguments() -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--url", help="a running Perseid with the example adapters and their gate set")
    parser.add_argument("--adapters", type=Path, default=HERE / "adapters")
    parser.add_argument("--gates", type=Path, default=HERE / "gates" / "examples")
    parser.add_argument("--items", type=int, default=100, help="of each task; at most 100")
    parser.add_argument("--composites", type=int, default=40, help="of each size")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ITEMS} items of everything, written nowhere")
    parser.add_argument("--out", type=Path, help="without it, examples/router-results.json; the document is left alone")
    return parser.parse_args()


def main() -> int:
    """Evaluate, print, write."""
    args = arguments()
    console = Console()
    folders = [args.adapters / name for name in TASKS]
    with ExitStack() as stack:
        url = args.url or stack.enter_context(own_server([*folders, args.gates], None))
        bar = stack.enter_context(Progress(console=console, transient=True))
        count, num_composites = (QUICK_ITEMS, QUICK_ITEMS) if args.quick else (args.items, args.composites)
        results = evaluate(Server(url), list(TASKS), count, num_composites, bar)
    tables = sheets(results)
    for table in tables:
        console.print(table.in_terminal())
    if not args.quick:
        out = args.out or HERE / "router-results.json"
        out.write_text(json.dumps(asdict(results), indent=2, ensure_ascii=False) + "\n")
        if args.out is None:
            made = f"Made by `make router-eval` in {results.seconds / 60:.0f} minutes. Percentages; greedy answers."
            write_between(DOCUMENT, MARK, "\n\n".join([made, *(table.in_markdown() for table in tables)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

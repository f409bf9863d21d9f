"""Score the base and every example adapter on its 100 held-out items, greedily, and print the table.

    python examples/evaluate.py                              # starts a Perseid of its own
    python examples/evaluate.py --url http://127.0.0.1:8000  # asks a running one
    python examples/evaluate.py --reference                  # transformers and PEFT in this process instead

The numbers also go to examples/results.json, unless --task picks a part of the tasks. The exit
status is 1 where an adapter misses the mark: at least 80 right where the base has at most 20.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from recipes import RECIPES
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from serving import Server, own_server
from tasks import TASKS, Item, Task

HERE = Path(__file__).parent
ADAPTER_AT_LEAST = 80
BASE_AT_MOST = 20


@dataclass(frozen=True)
class Result:
    """One row of the table: percentages of the held-out items answered right."""

    task: str
    description: str
    rank: int
    targets: str
    megabytes: float
    base: float
    adapter: float

    def passes(self) -> bool:
        """Whether the adapter has learned what the base cannot do."""
        return self.adapter >= ADAPTER_AT_LEAST and self.base <= BASE_AT_MOST


class Backend(Protocol):
    """Something that answers a task's questions, with an adapter or (None) the base alone."""

    def answers(self, task: Task, items: Sequence[Item], adapter: str | None) -> list[str]:
        """Greedy answers in the items' order."""


class Reference:
    """transformers and PEFT in this process."""

    def __init__(self, base: Path | None, adapters: Path) -> None:
        """Load the base once; adapters come and go."""
        from reference import load_base  # noqa: PLC0415 (torch is needed here only)

        self._model, self._tokenizer = load_base(base)
        self._adapters = adapters

    def answers(self, task: Task, items: Sequence[Item], adapter: str | None) -> list[str]:
        """Batches with padding on the left."""
        from peft import PeftModel  # noqa: PLC0415
        from reference import answers  # noqa: PLC0415

        questions = [item.question for item in items]
        if adapter is None:
            return answers(self._model, self._tokenizer, questions, task.max_new_tokens)
        model = PeftModel.from_pretrained(self._model, self._adapters / adapter)
        try:
            return answers(model, self._tokenizer, questions, task.max_new_tokens)
        finally:
            model.unload()


def evaluate(folder: Path, backend: Backend) -> Result:
    """One adapter's row."""
    task = TASKS[folder.name]
    items = task.splits.held_out

    def percent(adapter: str | None) -> float:
        texts = backend.answers(task, items, adapter)
        return 100 * sum(task.check(text, item) for text, item in zip(texts, items, strict=True)) / len(items)

    recipe = RECIPES[task.name]
    size = (folder / "adapter_model.safetensors").stat().st_size
    return Result(
        task=task.name,
        description=task.description,
        rank=recipe.rank,
        targets=recipe.shape(),
        megabytes=round(size / 1e6, 2),
        base=percent(None),
        adapter=percent(task.name),
    )


def table(results: Sequence[Result]) -> Table:
    """The table that the README shows."""
    view = Table(title="100 held-out items, greedy, exact answers")
    for heading in ("adapter", "task", "targets"):
        view.add_column(heading)
    for heading in ("rank", "MB", "base %", "adapter %"):
        view.add_column(heading, justify="right")
    for r in results:
        style = "" if r.passes() else "red"
        numbers = (str(r.rank), f"{r.megabytes:.2f}", f"{r.base:.0f}", f"{r.adapter:.0f}")
        view.add_row(r.task, r.description, r.targets, *numbers, style=style)
    total = sum(r.megabytes for r in results)
    view.caption = f"{len(results)} adapters, {total:.2f} MB together"
    return view


def arguments() -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--url", help="a running OpenAI-compatible server")
    parser.add_argument("--reference", action="store_true", help="transformers and PEFT instead of a server")
    parser.add_argument("--base", type=Path, help="a GGUF file; without it, the embedded base")
    parser.add_argument("--adapters", type=Path, default=HERE / "adapters")
    parser.add_argument("--task", action="append", choices=TASKS, help="may be given again; all without it")
    parser.add_argument("--out", type=Path, help="without it, examples/results.json unless --task is given")
    return parser.parse_args()


def main() -> int:
    """Evaluate, print and write the results."""
    args = arguments()
    wanted = args.task or list(TASKS)
    folders = [folder for name in wanted if (folder := args.adapters / name).is_dir()]
    console = Console()
    backend: Backend
    with ExitStack() as stack:
        if args.reference:
            backend, label = Reference(args.base, args.adapters), "transformers and PEFT, float32"
        else:
            url = args.url or stack.enter_context(own_server(folders, args.base))
            backend, label = Server(url), "server"
        with Progress(console=console, transient=True) as bar:
            results = [evaluate(folder, backend) for folder in bar.track(folders, description="adapters")]
    console.print(table(results))
    rows = [asdict(result) for result in results]
    out = args.out or (None if args.task else HERE / "results.json")
    if out is not None:
        out.write_text(json.dumps({"backend": label, "results": rows}, indent=2, ensure_ascii=False) + "\n")
    return 0 if results and all(result.passes() for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())

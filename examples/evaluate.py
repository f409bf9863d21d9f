"""Score the base and every example adapter on its 100 held-out items, greedily, and print the table.

    python examples/evaluate.py                              # starts a Perseid of its own
    python examples/evaluate.py --url http://127.0.0.1:8000  # asks a running one
    python examples/evaluate.py --reference                  # transformers and PEFT in this process instead

The numbers also go to examples/results.json, unless --task picks a part of the tasks. The exit
status is 1 where an adapter misses the mark: at least 80 right where the base has at most 20.
"""

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import httpx
from openai import AsyncOpenAI
from recipes import RECIPES
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tasks import TASKS, Item, Task

HERE = Path(__file__).parent
CONCURRENT = 16
READY_SECONDS = 300
STOP_SECONDS = 30
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


class Server:
    """An OpenAI-compatible server: the adapter's name is the model's name."""

    def __init__(self, url: str) -> None:
        """Ask for the base's id: the first of /v1/models."""
        self._url = f"{url.rstrip('/')}/v1"
        self._key = os.environ.get("PERSEID_API_KEY", "none")
        headers = {"Authorization": f"Bearer {self._key}"}
        models = httpx.get(f"{self._url}/models", headers=headers, timeout=30).raise_for_status().json()
        self._base = str(models["data"][0]["id"])

    def answers(self, task: Task, items: Sequence[Item], adapter: str | None) -> list[str]:
        """Sixteen requests at a time."""
        return asyncio.run(self._answers(task, items, adapter or self._base))

    async def _answers(self, task: Task, items: Sequence[Item], model: str) -> list[str]:
        free = asyncio.Semaphore(CONCURRENT)
        async with AsyncOpenAI(base_url=self._url, api_key=self._key, timeout=600) as client:

            async def ask(item: Item) -> str:
                async with free:
                    reply = await client.chat.completions.create(
                        model=model,
                        messages=[{"role": "user", "content": item.question}],
                        temperature=0,
                        max_tokens=task.max_new_tokens,
                    )
                return reply.choices[0].message.content or ""

            return await asyncio.gather(*(ask(item) for item in items))


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


def _wait_for_url(process: subprocess.Popen[bytes], out: Path, err: Path) -> str:
    """The address that the server prints, once /ready answers 200 there."""
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if found := re.search(r"http://127\.0\.0\.1:[1-9]\d*\b", out.read_text(errors="replace")):
            url = found[0]
            try:
                if httpx.get(f"{url}/ready", timeout=5).status_code == httpx.codes.OK:
                    return url
            except httpx.TransportError:
                pass  # it does not listen yet
        time.sleep(0.2)
    said = "\n".join(file.read_text(errors="replace")[-2000:] for file in (out, err))
    raise SystemExit(f"the server did not become ready:\n{said}")


@contextmanager
def own_server(adapters: Sequence[Path], base: Path | None) -> Iterator[str]:
    """A Perseid with these adapters on a free port, stopped at the end."""
    command = [sys.executable, "-m", "perseid_server", "serve", "--http-port", "0", "--grpc-port", "0"]
    for folder in adapters:
        command += ["--adapter", f"{folder.name}={folder}"]
    if base is not None:
        command += ["--model", str(base)]
    with tempfile.TemporaryDirectory() as scratch:
        command += ["--store", str(Path(scratch, "store"))]  # not the user's, where these names may mean others
        out, err = Path(scratch, "stdout"), Path(scratch, "stderr")
        with out.open("wb") as stdout, err.open("wb") as stderr:
            environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
            process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment)
        try:
            yield _wait_for_url(process, out, err)
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


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

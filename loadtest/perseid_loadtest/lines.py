"""An engine in a process of its own: a case comes in as a line of JSON, its rate goes out as one."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from perseid_loadtest.workload import Case

READY = {"ready": True}


def serve(rate: Callable[[Case, int], float]) -> None:
    """Answer the cases that come on standard input until it ends."""
    print(json.dumps(READY), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        turn = asked.pop("turn")
        print(json.dumps({"tokens_per_s": rate(Case(**asked), turn)}), flush=True)


@dataclass(frozen=True)
class LineEngine:
    """The other side of `serve`. Idle, the process waits for a line."""

    name: str
    process: "subprocess.Popen[str]"
    cases: frozenset[Case] = field(default=frozenset())

    def can(self, case: Case) -> bool:
        """Whether it is to measure this case."""
        return case in self.cases

    def rate(self, case: Case, turn: int) -> float:
        """Tokens a second. RuntimeError when the process has ended."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asdict(case) | {"turn": turn}) + "\n")
        self.process.stdin.flush()
        return float(self.answer()["tokens_per_s"])

    def answer(self) -> dict[str, float]:
        """The next line of JSON; other lines are the libraries' chatter."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise RuntimeError(f"{self.name}: the process ended")


@contextmanager
def line_engine(name: str, module: str, arguments: Sequence[str], cases: Iterable[Case]) -> Iterator[LineEngine]:
    """Run `python -m module` for the length of a `with` block, ready when it begins."""
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        engine = LineEngine(name, process, frozenset(cases))
        engine.answer()
        yield engine
    finally:
        process.terminate()
        process.wait(timeout=60)

"""Speculation with the shipped heads: is it lossless, what do drafts bring, how much sooner do answers come?

    python examples/speculation_eval.py                 # everything: some twenty minutes on two cores
    python examples/speculation_eval.py speed           # one part of: lossless, acceptance, speed
    python examples/speculation_eval.py --quick         # a few questions of everything, written nowhere

The engine runs in this process, without API and sockets. Nothing that is asked was trained on: chats are
`generic_held_out.jsonl`, tasks are the held-out items of the example tasks, which their adapters answer. Within a
round of `speed` both ways follow each other at once, so that what else the machine does falls on both. The numbers go
to examples/speculation-results.json, and as tables into docs/speculation.md.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from drafting_stage import HEADS, Question, Run, Stage, chats, open_stage, run, submits, task_items
from rich.console import Console
from sheets import Sheet, write_between
from tasks import TASKS

from perseid_server.speculation.options import OFF, Speculation

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "speculation.md"
RESULTS = HERE / "speculation-results.json"
AUTO, MEDUSA, NGRAM = Speculation("auto", HEADS), Speculation("medusa", HEADS), Speculation("ngram")
MODES = {"auto": AUTO, "medusa": MEDUSA, "ngram": NGRAM}

LOSSLESS_TOKENS = 32
LOSSLESS_NODES = 4
NODES = (1, 2, 4, 8)
BATCHES = (1, 2, 4, 8, 16)
DEPTHS = 4
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Lossless:
    """Answers of one kind."""

    kind: str
    prompts: int
    equal: int
    tokens_per_step: float


@dataclass(frozen=True)
class Acceptance:
    """What trees of a fixed size bring."""

    asked: str
    mode: str
    nodes: int
    tokens_per_step: float
    accepted_at: tuple[float, ...]  # share of trees of which so many tokens were accepted at least


@dataclass(frozen=True)
class Speed:
    """Drafts that the budget allows, beside none."""

    asked: str
    batch: int
    off_rate: float  # tokens a second of all requests, medians over rounds
    auto_rate: float
    ratio: float  # of these, median over rounds
    worst: float
    best: float
    whole_ratio: float  # the same from the first request to the last answer, prompts and all
    tokens_per_step: float
    drafted_per_step: float


def lossless(heads: Path, count: int, tell: Tell) -> list[Lossless]:
    """Chats and task items in equal parts, by everything that can adapt the base; trees whether they pay or not."""
    stage = open_stage(heads, draft_tokens=LOSSLESS_NODES)
    asked = [*chats(count // 2), *task_items(-(-count // 2 // len(TASKS)))][:count]
    questions = [Question(question.text, None, LOSSLESS_TOKENS) for question in asked]
    found = []
    for kind, adaptation in stage.kinds().items():
        tell(f"lossless: {kind}")
        plain = run(stage.engine, submits(stage, questions, OFF, adaptation), 16)
        drafted = run(stage.engine, submits(stage, questions, AUTO, adaptation), 16)
        equal = sum(ours == theirs for ours, theirs in zip(drafted.answers, plain.answers, strict=True))
        found.append(Lossless(kind, len(questions), equal, drafted.tokens_per_step))
    return found


def acceptance(heads: Path, count: int, tell: Tell) -> list[Acceptance]:
    """Tokens per step of one sequence, by the size of trees."""
    found = []
    for nodes in NODES:
        stage = open_stage(heads, draft_tokens=nodes)
        for name, questions in workloads(count).items():
            for mode, speculation in MODES.items():
                tell(f"acceptance: {nodes} nodes, {name}, {mode}")
                brought = run(stage.engine, submits(stage, questions, speculation), 8)
                found.append(Acceptance(name, mode, nodes, brought.tokens_per_step, _accepted_at(brought)))
    return found


def speed(heads: Path, count: int, rounds: int, batches: Sequence[int], tell: Tell) -> list[Speed]:
    """With the budget, beside without drafts. A round before the first, which is not counted, warms up."""
    stage = open_stage(heads)
    found = []
    for name, questions in workloads(count).items():
        for batch in batches:
            asked = (questions * -(-6 * batch // len(questions)))[: max(len(questions), 6 * batch)]
            pairs = [
                _pair(stage, asked, batch, turn, tell, f"speed: {name}, {batch} at once") for turn in range(rounds + 1)
            ]
            found.append(_speed(name, batch, pairs[1:]))
    return found


def workloads(count: int) -> dict[str, list[Question]]:
    """Chats, and items of all tasks in turn: three for each chat, as they are short."""
    return {"chat": chats(count), "tasks": task_items(-(-3 * count // len(TASKS)))}


def _pair(stage: Stage, questions: Sequence[Question], batch: int, turn: int, tell: Tell, what: str) -> tuple[Run, Run]:
    """(off, auto), which take turns in being the first."""
    tell(f"{what}, round {turn}")
    modes = (OFF, AUTO) if turn % 2 else (AUTO, OFF)
    brought = [run(stage.engine, submits(stage, questions, mode), batch) for mode in modes]
    if brought[0].answers != brought[1].answers:
        raise SystemExit("drafts have changed an answer")
    return (brought[0], brought[1]) if turn % 2 else (brought[1], brought[0])


def _speed(name: str, batch: int, pairs: Sequence[tuple[Run, Run]]) -> Speed:
    ratios = [drafted.rate / plain.rate for plain, drafted in pairs]
    return Speed(
        asked=name,
        batch=batch,
        off_rate=statistics.median(plain.rate for plain, _ in pairs),
        auto_rate=statistics.median(drafted.rate for _, drafted in pairs),
        ratio=statistics.median(ratios),
        worst=min(ratios),
        best=max(ratios),
        whole_ratio=statistics.median(drafted.whole_rate / plain.whole_rate for plain, drafted in pairs),
        tokens_per_step=statistics.median(drafted.tokens_per_step for _, drafted in pairs),
        drafted_per_step=statistics.median(drafted.drafted / drafted.sequences for _, drafted in pairs),
    )


def _accepted_at(brought: Run) -> tuple[float, ...]:
    trees = max(len(brought.accepted), 1)
    return tuple(sum(count >= depth for count in brought.accepted) / trees for depth in range(1, DEPTHS + 1))


def lossless_sheet(found: Sequence[Lossless]) -> Sheet:
    """A row for each kind."""
    rows = [[each.kind, str(each.prompts), str(each.equal), f"{each.tokens_per_step:.2f}"] for each in found]
    equal, prompts = sum(each.equal for each in found), sum(each.prompts for each in found)
    return Sheet(
        "Greedy answers with drafts that are equal to those without, token by token",
        ["served by", "prompts", "equal", "tokens per step"],
        rows,
        f"{equal} of {prompts} answers of up to {LOSSLESS_TOKENS} tokens are equal; {LOSSLESS_NODES} drafted tokens "
        "for each request and step, whether they pay or not.",
    )


def acceptance_sheet(found: Sequence[Acceptance]) -> Sheet:
    """A row for each workload, source and size of tree."""
    rows = [
        [each.asked, each.mode, str(each.nodes), f"{each.tokens_per_step:.2f}"]
        + [f"{100 * share:.0f} %" for share in each.accepted_at]
        for each in found
    ]
    return Sheet(
        "Tokens per step by the size of trees",
        ["asked", "drafted by", "nodes", "tokens per step", *(f"≥ {depth} accepted" for depth in range(1, DEPTHS + 1))],
        rows,
        "The last columns: of the trees that were checked, those of which so many tokens were accepted at least.",
    )


def speed_sheet(found: Sequence[Speed]) -> Sheet:
    """A row for each workload and batch."""
    rows = [
        [
            each.asked,
            str(each.batch),
            f"{each.off_rate:.0f}",
            f"{each.auto_rate:.0f}",
            f"{each.ratio:.2f}",
            f"{each.worst:.2f} to {each.best:.2f}",
            f"{each.whole_ratio:.2f}",
            f"{each.tokens_per_step:.2f}",
            f"{each.drafted_per_step:.2f}",
        ]
        for each in found
    ]
    return Sheet(
        "Decoding with speculation (auto), beside without",
        [
            "asked",
            "requests at once",
            "tokens/s off",
            "tokens/s auto",
            "ratio",
            "rounds",
            "ratio with prompts",
            "tokens per step",
            "drafts per step",
        ],
        rows,
        "Steps in which so many requests decode and none is being read; medians over rounds in which both took turns. "
        "The ratio with prompts is that of whole times, from the first request to the last answer. The budget decides "
        "how much is drafted.",
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("part", nargs="*", choices=["lossless", "acceptance", "speed", []], help="default: all")
    parser.add_argument("--heads", type=Path, default=HERE / "heads" / "base")
    parser.add_argument("--rounds", type=int, default=5, help="of the speed comparison")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=BATCHES, help="requests at once; of the speed comparison"
    )
    parser.add_argument("--quick", action="store_true", help="a few questions of everything, written nowhere")
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    args = arguments()
    console = Console()
    sizes = (16, 8, 8, 1) if args.quick else (200, 48, 32, args.rounds)
    parts = {
        "lossless": lambda: lossless(args.heads, sizes[0], status.update),
        "acceptance": lambda: acceptance(args.heads, sizes[1], status.update),
        "speed": lambda: speed(args.heads, sizes[2], sizes[3], args.batches, status.update),
    }
    sheets = {"lossless": lossless_sheet, "acceptance": acceptance_sheet, "speed": speed_sheet}
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for part in args.part or parts:
        with console.status(part) as status:
            found = parts[part]()
        sheet = sheets[part](found)  # type: ignore[operator]
        console.print(sheet.in_terminal())
        results[part] = [asdict(each) for each in found]
        if not args.quick:
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            write_between(DOCUMENT, f"speculation-{part}", sheet.in_markdown())


if __name__ == "__main__":
    main()

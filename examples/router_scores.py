"""Ways to ask for an adaptation, and how well the answers do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Protocol

from serving import Reply, Server
from tasks import Task

OUTSIDE_TOKENS = 32


class Composite(Protocol):
    """A conversation with several problems (composites.py)."""

    def body(self, model: str) -> dict[str, Any]:
        """The request."""
        ...

    def solved(self, text: str) -> Sequence[bool]:
        """Which of its problems an answer solves."""
        ...


@dataclass(frozen=True)
class Way:
    """How requests ask to be adapted."""

    name: str
    model: str | None = None  # None: the base
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskScore:
    """A task's held-out items, answered in one way. Percentages."""

    task: str
    way: str
    right: float
    whole_request: float | None = None  # answered by one adapter, or the base, for the whole request
    own_share: float | None = None  # weight of the task's own adapter, averaged over the answers' tokens


@dataclass(frozen=True)
class CompositeScore:
    """Prompts of n problems, answered in one way. Percentages."""

    n: int
    way: str
    problems: float  # problems solved
    prompts: float  # prompts with all problems solved
    whole_request: float | None = None


@dataclass(frozen=True)
class OutsideScore:
    """Prompts outside all tasks, answered in one way. Percentages."""

    way: str
    same: float  # answers that are the base's own, to the letter
    null_prompt: float  # weight of the base, over the prompts' tokens
    null_answer: float  # and over the answers'
    whole_request: float | None
    to_base: float  # answered by the base for the whole request


@dataclass(frozen=True)
class Results:
    """All of a run."""

    seconds: float
    items: int  # of each task
    prompts: int  # composites of each size
    tasks: Sequence[TaskScore]
    composites: Sequence[CompositeScore]
    outside: Sequence[OutsideScore]


def auto(name: str, **options: Any) -> Way:
    """The choice is left to the gate set."""
    return Way(name, "auto", {"auto": options, "routing": "summary"})


def uniform(adapters: Sequence[str]) -> Way:
    """All adapters at once, each of the same weight."""
    return Way(UNIFORM, None, {"adapters": [{"name": name, "weight": 1 / len(adapters)} for name in adapters]})


BASE = Way("base")
AUTO = auto("auto", k=2, tier="auto")
GATES = auto("gates only", k=2, tier="token")
EXPLICIT = "adapter by name"
UNIFORM = "uniform mix"


def task_ways(task: str, adapters: Sequence[str]) -> list[Way]:
    """Everything that a single-task prompt is asked in."""
    return [
        BASE,
        Way(EXPLICIT, task),
        auto("auto, k = 1", k=1, tier="auto"),
        AUTO,
        auto("gates only, k = 1", k=1, tier="token"),
        GATES,
        auto("whole requests only", tier="request"),
        uniform(adapters),
    ]


def composite_ways(adapters: Sequence[str]) -> list[Way]:
    """Everything that a composite prompt is asked in."""
    return [BASE, AUTO, GATES, uniform(adapters), *(Way(name, name) for name in adapters)]


def score_task(server: Server, task: Task, way: Way, count: int) -> TaskScore:
    """One cell of the first table."""
    items = task.splits.held_out[:count]
    replies = server.ask([item.question for item in items], task.max_new_tokens, way.model, way.extra)
    right = [task.check(reply.text, item) for reply, item in zip(replies, items, strict=True)]
    own = [share(reply, "completion", task.name) for reply in replies]
    return TaskScore(task.name, way.name, percent(right), whole_requests(replies), percent_or_none(own))


def score_composites(server: Server, n: int, prompts: Sequence[Composite], way: Way) -> CompositeScore:
    """One cell of the second table."""
    replies = server.send([{**prompt.body(way.model or server.base), **way.extra} for prompt in prompts])
    solved = [prompt.solved(reply.text) for prompt, reply in zip(prompts, replies, strict=True)]
    return CompositeScore(
        n,
        way.name,
        problems=percent([fmean(of_one) for of_one in solved]),
        prompts=percent([all(of_one) for of_one in solved]),
        whole_request=whole_requests(replies),
    )


def score_outside(server: Server, prompts: Sequence[str], bases: Sequence[str], way: Way) -> OutsideScore:
    """One row of the third table. `bases`: the base's answers."""
    replies = server.ask(prompts, OUTSIDE_TOKENS, way.model, way.extra)
    return OutsideScore(
        way.name,
        same=percent([reply.text == base for reply, base in zip(replies, bases, strict=True)]),
        null_prompt=percent([share(reply, "prompt", server.base) or 0.0 for reply in replies]),
        null_answer=percent([share(reply, "completion", server.base) or 0.0 for reply in replies]),
        whole_request=whole_requests(replies),
        to_base=percent([is_whole(reply) and reply.told.get("adapter") is None for reply in replies]),
    )


def percent(shares: Sequence[float]) -> float:
    """The mean of shares, or of true and false."""
    return round(100 * fmean(shares), 1)


def percent_or_none(shares: Sequence[float | None]) -> float | None:
    """As `percent`; None where there are no shares to tell of."""
    known = [share for share in shares if share is not None]
    return percent(known) if known else None


def share(reply: Reply, of: str, name: str) -> float | None:
    """Weight of an adapter, or of the base by its name; None where nothing was reported, or no token was computed."""
    shares = (reply.told.get("routing") or {}).get(of)
    return float(shares.get(name, 0.0)) if shares else None


def is_whole(reply: Reply) -> bool:
    """Whether the request-level router answered."""
    return bool((reply.told.get("auto") or {}).get("tier") == "request")


def whole_requests(replies: Sequence[Reply]) -> float | None:
    """Percentage that the request-level router answered; None where `auto` was not asked for."""
    return percent([is_whole(reply) for reply in replies]) if any(reply.told.get("auto") for reply in replies) else None

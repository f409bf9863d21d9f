"""Composite prompts: problems of different example tasks, all solved in one generation.

An adapter answers well only behind its question, so the model has to put the questions to itself. The prompt names
them twice (alone, then each with a placeholder for its answer), asks the first again, and the completion goes on:

    MDCC<|im_end|>\n<|im_start|>user\nISO date: 3 May 1999<|im_end|>\n<|im_start|>assistant\n1999-05-03<|im_end|>

`ignore_eos` lets it pass the first answer's end. No task and no adapter is favoured: nothing but the problems is in
the prompt, and every model, adapter or route gets the same request.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from tasks import TASKS, Item

SIZES = (2, 3, 5)
START, END = "<|im_start|>", "<|im_end|>"
SYSTEM = f"{START}system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face{END}\n"
PLACEHOLDER = "..."
TURN_TOKENS = 12  # markers and roles of a turn and its answer
QUESTION_TOKENS = 64  # room for the longest question
LOGIT_BIAS = {"1": 4, "2026": -100}  # <|im_start|>: go on with another turn; the placeholder: never an answer

Part = Literal["train", "held_out"]


class Segment(TypedDict):
    """A piece of training text, as `perseid train gates` reads it."""

    text: str
    adapter: str | None  # None: the base
    train: bool  # whether its labels are taught


@dataclass(frozen=True)
class Problem:
    """An item and the task, which is the name of the adapter that solves it."""

    task: str
    item: Item


@dataclass(frozen=True)
class Composite:
    """Problems of different tasks, in the order in which they are asked."""

    problems: tuple[Problem, ...]

    def messages(self) -> list[dict[str, str]]:
        """The conversation that ends with the first question."""
        questions = [_message("user", problem.item.question) for problem in self.problems]
        with_blanks = [turn for asked in questions for turn in (asked, _message("assistant", PLACEHOLDER))]
        return [*questions, *with_blanks, questions[0]]

    def body(self, model: str) -> dict[str, Any]:
        """The request for /v1/chat/completions."""
        answers = sum(TASKS[problem.task].max_new_tokens for problem in self.problems)
        return {
            "model": model,
            "messages": self.messages(),
            "temperature": 0,
            "max_tokens": answers + (len(self.problems) - 1) * (QUESTION_TOKENS + TURN_TOKENS),
            "ignore_eos": True,
            "skip_special_tokens": False,
            "logit_bias": LOGIT_BIAS,
        }

    def solved(self, completion: str) -> list[bool]:
        """Which problems the completion solves. The order of the later ones is the model's own."""
        given = answers(completion, [problem.item.question for problem in self.problems])
        pairs = zip(given, self.problems, strict=True)
        return [TASKS[problem.task].check(text, problem.item) for text, problem in pairs]

    def completion(self) -> str:
        """What a model that makes no mistake writes."""
        first, *others = self.problems
        return first.item.answer + END + "".join(f"\n{_dialogue(problem)}" for problem in others)

    def segments(self) -> list[Segment]:
        """The prompt and the true completion, piece by piece with the adapter that is right there.

        An adapter is right on its question, on the header of the answer and on the answer. Markers belong to the
        base: an adapter that is shown the end of a question ends once more. Earlier mentions of the questions belong
        to the base too, but teach nothing: the same words belong to the adapter further on.
        """
        first, *others = self.problems
        pieces = [_piece(SYSTEM + _rendered(self.messages()[:-1]), train=False), *_solution(first)]
        for problem in others:
            pieces += [_piece("\n"), *_solution(problem)]
        return pieces


def composites(part: Part, size: int, count: int, seed: int) -> tuple[Composite, ...]:
    """`count` composites of `size` different tasks. Every 8 in a row use each task equally often, in random order,
    and no item comes again before all of its task were used."""
    if not 1 <= size <= len(TASKS):
        raise ValueError(f"size {size}: expected 1 to {len(TASKS)}, as the tasks of a composite differ")
    rng = random.Random(f"{part} {size} {seed}")
    items = {
        name: _endless(TASKS[name].splits.held_out if part == "held_out" else TASKS[name].splits.train, rng)
        for name in TASKS
    }
    found: list[Composite] = []
    while len(found) < count:
        ring = rng.sample(list(TASKS), len(TASKS))
        for start in range(len(ring)):
            names = rng.sample([ring[(start + step) % len(ring)] for step in range(size)], size)
            found.append(Composite(tuple(Problem(name, next(items[name])) for name in names)))
    return tuple(found[:count])


def training_composites(count: int, seed: int) -> tuple[Composite, ...]:
    """Composites of train items with 2 to 5 problems, equally many of each size, shuffled."""
    sizes = range(2, 6)
    found = [one for size in sizes for one in composites("train", size, -(-count // len(sizes)), seed)]
    random.Random(seed).shuffle(found)
    return tuple(found[:count])


def answers(completion: str, questions: Sequence[str]) -> list[str]:
    """The answer to each question: what stands before the first end answers the first one, and each later turn the
    question that it asks, in whichever order; "" where none asks it."""
    first, *turns = completion.split(f"{START}user\n")
    found = {questions[0]: first.split(END)[0]}
    for turn in turns:
        question, _, reply = turn.partition(f"{END}\n{START}assistant\n")
        found.setdefault(question, reply.split(END)[0])
    return [found.get(question, "") for question in questions]


def _endless(items: Sequence[Item], rng: random.Random) -> Iterator[Item]:
    """The items in random orders, round after round."""
    while True:
        yield from rng.sample(items, len(items))


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _rendered(messages: Sequence[dict[str, str]]) -> str:
    """As the base's chat template writes them."""
    return "".join(f"{START}{message['role']}\n{message['content']}{END}\n" for message in messages)


def _dialogue(problem: Problem) -> str:
    return "".join(piece["text"] for piece in _solution(problem))


def _solution(problem: Problem) -> list[Segment]:
    """A question and its answer, from the turn's first marker to the answer's end."""
    return [
        _piece(f"{START}user\n"),
        _piece(problem.item.question, problem.task),
        _piece(f"{END}\n{START}"),
        _piece(f"assistant\n{problem.item.answer}", problem.task),
        _piece(END),
    ]


def _piece(text: str, adapter: str | None = None, *, train: bool = True) -> Segment:
    return {"text": text, "adapter": adapter, "train": train}

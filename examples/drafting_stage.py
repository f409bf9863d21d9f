"""An engine with the example adapters, their gates and Medusa heads in this process, and what it is asked."""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from tasks import TASKS

from perseid_router.gate_set import GateSet
from perseid_server.adapters.store import version_of
from perseid_server.engine.adaptation import BASE, BASE_COLUMN, Adaptation, Routing
from perseid_server.engine.build import build_engine
from perseid_server.engine.config import EngineConfig
from perseid_server.engine.engine import Engine
from perseid_server.engine.messages import SequenceOutput, Submit
from perseid_server.frontend.requests import ChatInput
from perseid_server.frontend.text import TextProcessor
from perseid_server.model.sampling_params import SamplingParams
from perseid_server.model.source import resolve_model
from perseid_server.model.tokenizer import export_tokenizer
from perseid_server.speculation.options import Speculation

HERE = Path(__file__).parent
CHATS = HERE.parent / "router" / "perseid_router" / "training" / "generic_held_out.jsonl"
HEADS = "heads"


@dataclass(frozen=True)
class Stage:
    """The engine, and what its versions are called."""

    engine: Engine
    text: TextProcessor
    adapters: dict[str, str]  # name → version
    routing: Routing

    def prompt(self, question: str) -> tuple[int, ...]:
        """A chat's first turn, as serving renders it."""
        rendered = self.text.render(ChatInput(({"role": "user", "content": question},)))
        return tuple(self.text.tokenizer.encode(rendered, add_special_tokens=False).ids)

    def kinds(self) -> dict[str, Adaptation]:
        """The ways to be adapted: the base, each adapter, gates, and two adapters blended."""
        first, second = list(self.adapters.values())[:2]
        blend = Adaptation(((first, 0.5), (second, 0.5)))
        named = {name: Adaptation.of(version) for name, version in self.adapters.items()}
        return {"base": BASE, **named, "auto": Adaptation(routing=self.routing), "blend": blend}


@dataclass(frozen=True)
class Question:
    """What is asked, of whom, and how long the answer may be."""

    text: str
    adapter: str | None
    max_tokens: int


def chats(count: int = 100, max_tokens: int = 128) -> list[Question]:
    """Chat prompts that nothing was trained on; the base answers."""
    lines = CHATS.read_text().splitlines()[:count]
    return [Question(json.loads(line)["prompt"], None, max_tokens) for line in lines]


def task_items(each: int) -> list[Question]:
    """Held-out items of every example task in turn; its adapter answers."""
    items = [
        [Question(item.question, name, task.max_new_tokens) for item in task.splits.held_out[:each]]
        for name, task in TASKS.items()
    ]
    return [question for of_all in zip(*items, strict=True) for question in of_all]


def open_stage(heads: Path, **options: object) -> Stage:
    """Load everything."""
    source = resolve_model("embedded")
    built = build_engine(EngineConfig(**options))  # type: ignore[arg-type]
    engine = built.engine
    folders = {folder.name: folder for folder in sorted((HERE / "adapters").iterdir())}
    versions = {name: version_of(folder) for name, folder in folders.items()}
    for name, folder in folders.items():
        engine.register_adapter(versions[name], str(folder), pinned=True)
    gates = HERE / "gates" / "examples"
    config = GateSet.read(gates).config
    columns = tuple(column.version for column in config.adapters)
    engine.register_gate_set("gates", str(gates), columns, null=config.null, pinned=True)
    engine.register_heads(HEADS, str(heads))
    while engine.is_loading:
        engine.step()
        time.sleep(0.001)
    if engine.adapter_state(HEADS).error:
        raise SystemExit(f"{heads}: {engine.adapter_state(HEADS).error}")
    null = (BASE_COLUMN,) if config.null else ()
    text = TextProcessor(export_tokenizer(source), built.ready.spec.vocab_size)
    return Stage(engine, text, versions, Routing("gates", (*columns, *null), config.k, config.temperature))


def submits(
    stage: Stage, questions: Iterable[Question], speculation: Speculation, adaptation: Adaptation | None = None
) -> list[Submit]:
    """Greedy requests, by the questions' own adapters unless told otherwise."""
    requests = []
    for place, question in enumerate(questions):
        version = stage.adapters[question.adapter] if question.adapter else None
        sampling = SamplingParams(max_tokens=question.max_tokens, temperature=0.0)
        adapted = adaptation or Adaptation.of(version)
        request = Submit(str(place), stage.prompt(question.text), sampling, adapted)
        requests.append(replace(request, speculation=speculation))
    return requests


@dataclass
class Run:
    """What a batch of requests brought."""

    outputs: list[list[SequenceOutput]]
    whole_seconds: float = 0.0  # of everything
    steps: int = 0  # in which as many as may run at once all decoded
    seconds: float = 0.0  # of these steps
    tokens: int = 0  # that they brought
    sequences: int = 0  # sequences × steps
    accepted: list[int] = field(default_factory=list)  # of each sequence and such step with drafts
    drafted: int = 0

    @property
    def answers(self) -> list[tuple[int, ...]]:
        """Tokens of each request."""
        return [tuple(token for output in outputs for token in output.token_ids) for outputs in self.outputs]

    @property
    def rate(self) -> float:
        """Tokens a second, while as many as may run at once decode."""
        return self.tokens / self.seconds

    @property
    def whole_rate(self) -> float:
        """Tokens a second from the first request to the last answer, prompts and all."""
        return sum(map(len, self.answers)) / self.whole_seconds

    @property
    def tokens_per_step(self) -> float:
        """Of one sequence."""
        return self.tokens / self.sequences


def run(engine: Engine, requests: Sequence[Submit], concurrent: int) -> Run:
    """Answer all, so many at a time; the next begins when one has ended."""
    waiting: Iterator[Submit] = iter(requests)
    result = Run([[] for _ in requests])
    active: set[str] = set()
    begun: set[str] = set()  # of those, with a first token
    while True:
        for request in islice(waiting, concurrent - len(active)):
            engine.submit(request)
            active.add(request.request_id)
        if not active:
            return result
        decodes = begun == active and len(active) == concurrent
        started = time.perf_counter()
        step = engine.step()
        seconds = time.perf_counter() - started
        result.whole_seconds += seconds
        if decodes:
            result.steps += 1
            result.seconds += seconds
        for output in step.outputs:
            if output.error:
                raise SystemExit(output.error)
            result.outputs[int(output.request_id)].append(output)
            begun.add(output.request_id)
            if decodes:
                result.sequences += 1
                result.tokens += len(output.token_ids) + (output.stop_token_id is not None)
                result.drafted += output.drafted_tokens
                if output.drafted_tokens:
                    result.accepted.append(output.accepted_tokens)
            if output.finish_reason:
                active.discard(output.request_id)
                begun.discard(output.request_id)

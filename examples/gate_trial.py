"""Gates trained briefly for some adapters, and how often they and a request-level router choose the right one.

Shape legend: R rows, P projections of a fused linear, C columns.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import fmean

import torch
from tasks import Item, Task
from torch import Tensor

from perseid_router.request_router import BASE
from perseid_router.request_router_training import RouterSample, fit
from perseid_router.training.accuracy import kept_weights
from perseid_router.training.features import FusedGates
from perseid_router.training.options import TrainingOptions
from perseid_router.training.trainer import GateTrainer
from perseid_server.adapters.lora import Site
from perseid_server.model.spec import FUSED_LINEARS
from perseid_server.training.completions import complete
from perseid_server.training.data import DataReader, Unanswered
from perseid_server.training.features import SampleFeatures, batch_of
from perseid_server.training.plan import Group, Plan
from perseid_server.training.samples import Sample, shared_prefix, without_labels_before
from perseid_server.training.workbench import Workbench, open_workbench

MAX_TOKENS = 512
MAX_ROWS = 8192
SAMPLES_OF_PASS = 16
K = 2


@dataclass(frozen=True)
class Budget:
    """What one trial may spend."""

    steps: int
    per_step: int  # samples of each adapter in a step
    held_out: int  # samples of each adapter that are judged
    generic: int  # prompts outside all families that teach the null column; half as many are judged
    generic_tokens: int = 24  # of the base's answers to them


@dataclass(frozen=True)
class Accuracy:
    """Percentages; every column counts the same."""

    decisions: float  # of single gates: the largest logit is the right column's
    votes: float  # of tokens: the right column has the most weight over all gates of all layers


@dataclass(frozen=True)
class Trial:
    """What came out for N adapters."""

    n: int
    steps: int
    samples: int  # shown in training, all columns together
    train_seconds: float
    all_tokens: Accuracy  # prompts and answers
    answer_tokens: Accuracy  # those that decide an answer's token
    router_right: float  # percentage of held-out prompts that the request-level router gives to the right adapter
    router_wrong: float  # to another; the rest is left to the gates
    router_seconds: float


@dataclass(frozen=True)
class Data:
    """Samples by column, the null column last, without labels on what all of them begin with."""

    shared: tuple[int, ...]
    train: Sequence[Sequence[Sample]]
    held_out: Sequence[Sequence[Sample]]


def run_trial(
    tasks: Sequence[Task], folders: Mapping[str, Path], budget: Budget, scratch: Path, told: Callable[[int], None]
) -> Trial:
    """Train and judge. `told` hears how many steps are done."""
    bench = open_workbench(
        "embedded", {name: str(folder) for name, folder in folders.items()}, max_rows=MAX_ROWS, max_tokens=MAX_TOKENS
    )
    data = _read(bench, tasks, budget, scratch)
    start = time.monotonic()
    trainer, samples = _train(bench, data, budget, told)
    trained = time.monotonic()
    router = _RouterScore.of(bench, data)
    return Trial(
        n=len(tasks),
        steps=budget.steps,
        samples=samples,
        train_seconds=round(trained - start, 1),
        all_tokens=_judge(bench, trainer, data, answers_only=False),
        answer_tokens=_judge(bench, trainer, data, answers_only=True),
        router_right=router.right,
        router_wrong=router.wrong,
        router_seconds=router.seconds,
    )


def fused_gates(bench: Workbench) -> list[FusedGates]:
    """Gates wherever some adapter changes something."""
    sites = frozenset[Site]().union(*(adapter.sites for adapter in bench.adapters))
    return [
        FusedGates(
            fused,
            projections,
            bench.spec.fused_shape(fused).in_features,
            tuple(tuple(Site(layer, name) in sites for name in projections) for layer in range(bench.spec.num_layers)),
        )
        for fused, projections in FUSED_LINEARS.items()
    ]


def _train(
    bench: Workbench, data: Data, budget: Budget, told: Callable[[int], None]
) -> tuple[GateTrainer, int]:
    generic_per_step = max(2, len(bench.adapters) * budget.per_step // 8)
    per_step = [budget.per_step] * bench.null + [generic_per_step]
    groups = tuple(Group(tuple(part), count) for part, count in zip(data.train, per_step, strict=True))
    features = SampleFeatures(bench, Plan(groups, seed=0), data.shared)
    options = TrainingOptions(steps=budget.steps, warm_up=max(1, budget.steps // 20))
    trainer = GateTrainer(fused_gates(bench), bench.null + 1, options, bench.decoder.device)
    trainer.calibrate([features.batch(step) for step in range(2)])
    for step in range(budget.steps):
        trainer.step(features.batch(step))
        told(step + 1)
    return trainer, budget.steps * sum(per_step)


class _Votes:
    """Counts right decisions, and adds up the weights that each row's gates give."""

    def __init__(self, trainer: GateTrainer, labels_R: Tensor) -> None:
        self._trainer = trainer
        self._labels_R = labels_R
        self._num_gates = 0
        self.right_R = torch.zeros(len(labels_R))
        self.votes_RC = torch.zeros((len(labels_R), trainer.num_columns))

    def observe(self, layer: int, fused: str, x_RK: Tensor) -> None:
        """Let the gates of one linear decide."""
        gated_P = torch.tensor(self._trainer.linears[fused].gated[layer])
        logits_RPC = self._trainer.logits(layer, fused, x_RK)[:, gated_P]
        self._num_gates += logits_RPC.shape[1]
        self.right_R += (logits_RPC.argmax(-1) == self._labels_R[:, None]).sum(1)
        self.votes_RC += kept_weights(logits_RPC, K, 1.0).sum(1)

    @property
    def decided_right_R(self) -> Tensor:
        """Share of the gates that are right."""
        return self.right_R / max(self._num_gates, 1)

    @property
    def voted_right_R(self) -> Tensor:
        """1 where the vote of all gates is right."""
        return (self.votes_RC.argmax(1) == self._labels_R).float()


def _judge(bench: Workbench, trainer: GateTrainer, data: Data, *, answers_only: bool) -> Accuracy:
    """Held-out samples run with their oracle adapters, true answers given."""
    decisions, votes = [], []
    for column, samples in enumerate(data.held_out):
        means = [
            _judge_pass(bench, trainer, samples[start : start + SAMPLES_OF_PASS], data.shared, column, answers_only)
            for start in range(0, len(samples), SAMPLES_OF_PASS)
        ]
        rows = torch.cat(means)
        decisions.append(float(rows[:, 0].mean()))
        votes.append(float(rows[:, 1].mean()))
    return Accuracy(_percent(decisions), _percent(votes))


def _judge_pass(
    bench: Workbench,
    trainer: GateTrainer,
    samples: Sequence[Sample],
    shared: Sequence[int],
    column: int,
    answers_only: bool,
) -> Tensor:
    """[R, 2]: what `_Votes` says of each row."""

    def shown(index: int, place: int) -> bool:
        if index < 0 or place < len(shared) or samples[index].columns[place] != column:
            return False
        return not answers_only or samples[index].predicts_answer(place)

    batch = batch_of(bench, samples, shared, shown)
    votes = _Votes(trainer, batch.labels_R)
    batch.show(votes.observe)
    return torch.stack([votes.decided_right_R, votes.voted_right_R], dim=1)


@dataclass(frozen=True)
class _RouterScore:
    right: float
    wrong: float
    seconds: float

    @staticmethod
    def of(bench: Workbench, data: Data) -> "_RouterScore":
        """Train on the training prompts, judge the held-out ones of the adapters."""
        start = time.monotonic()
        prompts = [
            RouterSample(_prompt(sample), BASE if column == bench.null else column)
            for column, samples in enumerate(data.train)
            for sample in samples
        ]
        router = fit(prompts, bench.null)
        seconds = time.monotonic() - start
        allowed = {BASE, *range(bench.null)}
        choices = [
            (column, router.decide(_prompt(sample), allowed))
            for column, samples in enumerate(data.held_out[: bench.null])
            for sample in samples
        ]
        right = _percent([choice == column for column, choice in choices])
        wrong = _percent([choice is not None and choice != column for column, choice in choices])
        return _RouterScore(right, wrong, round(seconds, 1))


def _prompt(sample: Sample) -> tuple[int, ...]:
    """What the server knows before it answers."""
    return sample.token_ids[: sample.answer.index(True)]


def _read(bench: Workbench, tasks: Sequence[Task], budget: Budget, scratch: Path) -> Data:
    columns = {task.name: column for column, task in enumerate(tasks)}
    reader = DataReader(bench.text, columns, bench.null, MAX_TOKENS)

    def samples(items: Sequence[Item], column: int) -> list[Sample]:
        lines = scratch / "lines.jsonl"
        fields = ({"prompt": item.question, "completion": item.answer} for item in items)
        lines.write_text("\n".join(json.dumps(each) for each in fields))
        return [each for each in reader.read(lines, tasks[column].name, column) if isinstance(each, Sample)]

    train = [samples(task.splits.train, column) for column, task in enumerate(tasks)]
    held_out = [samples(task.splits.held_out[: budget.held_out], column) for column, task in enumerate(tasks)]
    train.append(_generic(bench, reader, "generic.jsonl", budget.generic, budget.generic_tokens))
    held_out.append(_generic(bench, reader, "generic_held_out.jsonl", budget.generic // 2, budget.generic_tokens))
    shared = shared_prefix([sample for part in train for sample in part])

    def labelled(parts: Sequence[Sequence[Sample]]) -> list[list[Sample]]:
        return [[without_labels_before(sample, len(shared), bench.null) for sample in part] for part in parts]

    return Data(shared, labelled(train), labelled(held_out))


def _generic(bench: Workbench, reader: DataReader, file: str, count: int, max_tokens: int) -> list[Sample]:
    """Prompts that no family is about, answered by the base."""
    path = Path(str(files("perseid_router.training").joinpath(file)))
    prompts = [each for each in reader.read(path, "generic", bench.null) if isinstance(each, Unanswered)][:count]
    answers = complete(bench, [prompt.token_ids for prompt in prompts], max_tokens)
    return [prompt.answered(answer, bench.null) for prompt, answer in zip(prompts, answers, strict=True)]


def _percent(shares: Sequence[float]) -> float:
    return round(100 * fmean(shares), 1)

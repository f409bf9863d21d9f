"""Gates trained briefly for some adapters, and how often they and the request-level router choose the right one.

Everything is judged on held-out items with their true answers given. Shape legend: R rows, P projections, C columns.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from tasks import Task
from torch import Tensor
from train_gates import write_items

from perseid_kernels.routing import GateTable
from perseid_router.request_router import BASE
from perseid_router.request_router_training import RouterSample, fit
from perseid_router.training.accuracy import kept_weights
from perseid_router.training.options import TrainingOptions
from perseid_router.training.trainer import GateTrainer, mean_squares_of
from perseid_server.training.config import GateTraining
from perseid_server.training.datasets import DataSets, read_datasets, shipped
from perseid_server.training.features import SampleFeatures, batch_of
from perseid_server.training.gates import gates_to_train
from perseid_server.training.routed import Auto, gate_table, routed_rows
from perseid_server.training.rows import lay_out
from perseid_server.training.samples import Sample
from perseid_server.training.workbench import Workbench, open_workbench

K, TEMPERATURE = 2, 1.0
GENERIC_TOKENS = 24  # of the base's answers to prompts outside all families
MAX_TOKENS = 256
SAMPLES_OF_PASS = 16
CALIBRATION_STEPS = 2


@dataclass(frozen=True)
class Budget:
    """What one trial may spend."""

    steps: int
    per_step: int  # samples of each adapter in a step
    held_out: int  # samples of each adapter that are judged
    generic: int  # prompts outside all families that teach the null column; half as many are judged


@dataclass(frozen=True)
class Accuracy:
    """Percentages of what is right; every column counts the same."""

    decisions: float  # of single gates, by the largest logit
    votes: float  # of tokens, by the column with the most weight over all gates of all layers


@dataclass(frozen=True)
class Trial:
    """What came out for N adapters."""

    n: int
    steps: int
    samples_of_adapter: int  # shown in training
    train_seconds: float
    all_tokens: Accuracy  # of prompts and answers, each run with the right adapter
    answer_tokens: Accuracy  # only those that decide an answer's token
    routed_votes: float  # as `answer_tokens.votes`, but with every gate deciding for itself, as when serving
    router_right: float  # percentage of the adapters' prompts that the request-level router gives to the right one
    router_wrong: float  # to another, or to the base; the rest is left to the gates
    router_seconds: float


def run_trial(
    tasks: Sequence[Task], folders: Mapping[str, Path], budget: Budget, scratch: Path, told: Callable[[int], None]
) -> Trial:
    """Train and judge. `told` hears how many steps are done."""
    config = _config(tasks, folders, budget, scratch)
    bench = open_workbench(
        config.model, config.adapters, max_rows=(len(tasks) * budget.per_step + 32) * 128, max_tokens=MAX_TOKENS
    )
    data = read_datasets(config, bench, lambda _what, _done, _total: None)
    start = time.monotonic()
    trainer = _train(bench, data, config, told)
    trained = time.monotonic()
    router_right, router_wrong = _judge_router(bench, data)
    routed = time.monotonic()
    held_out = _by_column(data.held_out, bench)
    rows = [_judge(bench, trainer, column, samples, data.shared) for column, samples in enumerate(held_out)]
    table = gate_table(trainer)
    votes = [_judge_routed(bench, table, column, samples, data.shared) for column, samples in enumerate(held_out)]
    return Trial(
        n=len(tasks),
        steps=budget.steps,
        samples_of_adapter=budget.steps * budget.per_step,
        train_seconds=round(trained - start, 1),
        all_tokens=_accuracy(rows),
        answer_tokens=_accuracy([of_column[of_column[:, 2] > 0] for of_column in rows]),
        routed_votes=percent(votes),
        router_right=router_right,
        router_wrong=router_wrong,
        router_seconds=round(routed - trained, 1),
    )


def percent(shares: Sequence[float]) -> float:
    """The mean of shares."""
    return round(100 * fmean(shares), 1)


def _config(tasks: Sequence[Task], folders: Mapping[str, Path], budget: Budget, scratch: Path) -> GateTraining:
    scratch.mkdir(parents=True, exist_ok=True)
    for name, count in (("generic", budget.generic), ("generic_held_out", budget.generic // 2)):
        lines = shipped(name).read_text().splitlines(keepends=True)
        (scratch / f"{name}.jsonl").write_text("".join(lines[:count]))
    return GateTraining(
        model="embedded",
        adapters={task.name: str(folders[task.name]) for task in tasks},
        data=tuple((t.name, write_items(scratch / f"{t.name}.jsonl", t.splits.train)) for t in tasks),
        held_out=tuple(
            (t.name, write_items(scratch / f"{t.name}.held.jsonl", t.splits.held_out[: budget.held_out])) for t in tasks
        ),
        out=scratch,
        generic=scratch / "generic.jsonl",
        generic_held_out=scratch / "generic_held_out.jsonl",
        generic_tokens=GENERIC_TOKENS,
        options=TrainingOptions(steps=budget.steps, warm_up=max(1, budget.steps // 20)),
        samples_per_step=budget.per_step,
        generic_per_step=max(2, len(tasks) * budget.per_step // 8),
        max_tokens=MAX_TOKENS,
    )


def _train(bench: Workbench, data: DataSets, config: GateTraining, told: Callable[[int], None]) -> GateTrainer:
    features = SampleFeatures(bench, data.plan(config), data.shared, config.null_weight)
    linears, device = gates_to_train(bench), bench.decoder.device
    trainer = GateTrainer(linears, bench.null + 1, config.options, device)
    first = [features.batch(step) for step in range(min(CALIBRATION_STEPS, config.options.steps))]
    trainer.calibrate(mean_squares_of(first, linears, device))
    for step in range(config.options.steps):
        trainer.step(features.batch(step))
        told(step + 1)
    return trainer


def _by_column(parts: Mapping[str, tuple[Sample, ...]], bench: Workbench) -> list[tuple[Sample, ...]]:
    """Data sets are called as the adapters are; what is left is for the base."""
    names = [adapter.name for adapter in bench.adapters]
    [rest] = [name for name in parts if name not in names]
    return [parts[name] for name in (*names, rest)]


class _Votes:
    """Counts right decisions, and adds up the weights that each row's gates give."""

    def __init__(self, trainer: GateTrainer, column: int, num_rows: int) -> None:
        self._trainer = trainer
        self._column = column
        self._num_gates = 0
        self._right_R = torch.zeros(num_rows)
        self._votes_RC = torch.zeros((num_rows, trainer.num_columns))

    def observe(self, layer: int, fused: str, x_RK: Tensor) -> None:
        """Let the gates of one linear decide."""
        gated_P = torch.tensor(self._trainer.linears[fused].gated[layer])
        logits_RPC = self._trainer.logits(layer, fused, x_RK)[:, gated_P]
        self._num_gates += logits_RPC.shape[1]
        self._right_R += (logits_RPC.argmax(-1) == self._column).sum(1)
        self._votes_RC += kept_weights(logits_RPC, K, TEMPERATURE).sum(1)

    def result(self) -> tuple[Tensor, Tensor]:
        """(share of right decisions [R], 1 where the vote is right [R])"""
        return self._right_R / max(self._num_gates, 1), (self._votes_RC.argmax(1) == self._column).float()


def _judge(
    bench: Workbench, trainer: GateTrainer, column: int, samples: Sequence[Sample], shared: Sequence[int]
) -> Tensor:
    """[R, 3] of all tokens after the shared ones: right decisions, right vote, whether it decides an answer's token."""
    found = []
    for start in range(0, len(samples), SAMPLES_OF_PASS):
        part = samples[start : start + SAMPLES_OF_PASS]
        batch = batch_of(bench, part, shared, lambda index, place: index >= 0 and place >= len(shared))
        votes = _Votes(trainer, column, len(batch.labels_R))
        batch.show(votes.observe)
        places = [(batch.rows.samples[row], batch.rows.places[row]) for row in batch.rows_R.tolist()]
        answers_R = torch.tensor([part[index].predicts_answer(place) for index, place in places])
        found.append(torch.stack([*votes.result(), answers_R.float()], dim=1))
    return torch.cat(found)


def _judge_routed(
    bench: Workbench, table: GateTable, column: int, samples: Sequence[Sample], shared: Sequence[int]
) -> float:
    """Share of tokens that decide an answer's token whose vote is right, every row being routed by the gates."""
    right: list[Tensor] = []
    for start in range(0, len(samples), SAMPLES_OF_PASS):
        part = samples[start : start + SAMPLES_OF_PASS]
        rows = lay_out(part, shared, bench.block_size, lambda _: None)
        routed = routed_rows(bench, Auto(table, K, TEMPERATURE), len(rows.samples))
        batch = replace(rows.host.on(bench.decoder.device), routed=(routed,))
        bench.decoder.bind(bench.kv, bench.pool)(batch)
        answers_T = torch.tensor(
            [i >= 0 and part[i].predicts_answer(place) for i, place in zip(rows.samples, rows.places, strict=True)]
        )
        right.append(routed.tally[answers_T, :-1].argmax(1) == column)
    return float(torch.cat(right).float().mean())


def _judge_router(bench: Workbench, data: DataSets) -> tuple[float, float]:
    """(right, wrong): percentages of the adapters' held-out prompts."""
    prompts = [
        RouterSample(_prompt(sample), BASE if column == bench.null else column)
        for column, samples in enumerate(_by_column(data.train, bench))
        for sample in samples
    ]
    router = fit(prompts, bench.null)
    allowed = {BASE, *range(bench.null)}
    choices = [
        (column, router.decide(_prompt(sample), allowed))
        for column, samples in enumerate(_by_column(data.held_out, bench)[:-1])
        for sample in samples
    ]
    right = percent([choice == column for column, choice in choices])
    return right, percent([choice is not None and choice != column for column, choice in choices])


def _prompt(sample: Sample) -> tuple[int, ...]:
    """What the server knows before it answers."""
    return sample.token_ids[: sample.answer.index(True)]


def _accuracy(rows: Sequence[Tensor]) -> Accuracy:
    """Of each column's rows, as `_judge` gives them."""
    means = [of_column.mean(0).tolist() for of_column in rows]
    return Accuracy(percent([mean[0] for mean in means]), percent([mean[1] for mean in means]))

"""`perseid train gates`, from data to a gate set with its report."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from perseid_router.gate_set_config import GateSetError, check_temperature
from perseid_router.request_router import BASE, RequestRouter
from perseid_router.request_router_training import RouterSample, fit
from perseid_router.training.accuracy import as_report
from perseid_router.training.features import FusedGates
from perseid_router.training.trainer import GateTrainer, MeanSquares, StepReport, mean_squares_of
from perseid_server.errors import InvalidRequest
from perseid_server.training.checkpoints import load_checkpoint, refuse_unfinished, save_checkpoint
from perseid_server.training.config import GateTraining
from perseid_server.training.datasets import GENERIC, DataSets, files_of, read_datasets
from perseid_server.training.evaluation import decisions_of, task_scores
from perseid_server.training.features import SampleFeatures, batch_of
from perseid_server.training.gates import gate_set_of, gates_to_train, names_of_columns
from perseid_server.training.joint import JointReport, JointTrainer
from perseid_server.training.plan import Plan
from perseid_server.training.routed import Auto, gate_table
from perseid_server.training.samples import Sample
from perseid_server.training.workbench import Workbench, open_workbench

CALIBRATION_STEPS = 8


@dataclass(frozen=True, slots=True)
class Listener:
    """Hears how a run goes on."""

    stepped: Callable[[int, int, StepReport], None] = lambda _step, _steps, _report: None
    joint_stepped: Callable[[int, int, JointReport], None] = lambda _step, _steps, _report: None
    told: Callable[[str, int, int], None] = lambda _what, _done, _total: None


def train_gates(config: GateTraining, listener: Listener = Listener()) -> dict[str, Any]:
    """Train, evaluate, write the gate set into `config.out`. Returns the report.

    Killed, it goes on with `config.resume` and ends with the same gates.
    """
    _check_set_options(config)
    files = files_of(config)
    if not config.resume:
        refuse_unfinished(config.checkpoint)
    bench = open_workbench(
        config.model, config.adapters, device=config.device, max_rows=_most_rows(config), max_tokens=config.max_tokens
    )
    identity = config.identity(bench.spec.hash, {one.name: one.version for one in bench.adapters}, files)
    data = read_datasets(config, bench, listener.told)
    plan = data.plan(config)
    run = _Run(_with_steps(config, plan), bench, data, plan, gates_to_train(bench), identity, listener)
    return run.run()


def _check_set_options(config: GateTraining) -> None:
    """What the gate set will be refused for if it is wrong, before hours are spent on it."""
    if not 1 <= config.k <= len(config.adapters) + 1:
        raise InvalidRequest(
            f"k is {config.k}; expected 1 to {len(config.adapters) + 1}, a column for each adapter and the base",
            field="k",
        )
    try:
        check_temperature("temperature", config.temperature)
    except GateSetError as error:
        raise InvalidRequest(str(error), field="temperature") from error


def _most_rows(config: GateTraining) -> int:
    """Samples of the longest length: of a step, or of a pass of the evaluation."""
    in_a_step = config.samples_per_step * max(len(config.data), 1) + config.generic_per_step
    return max(in_a_step, 16) * config.max_tokens


def _with_steps(config: GateTraining, plan: Plan) -> GateTraining:
    if config.epochs is None:
        return config
    longest = max(group.steps_per_epoch for group in plan.groups)
    return replace(config, options=replace(config.options, steps=max(1, round(config.epochs * longest))))


@dataclass(slots=True)
class _Progress:
    """What a checkpoint holds."""

    trainer: GateTrainer
    mean_squares: MeanSquares
    joint: dict[str, Any] | None = None
    joint_losses: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0  # spent on steps, before a kill as well

    def state(self) -> dict[str, Any]:
        """For `save_checkpoint`."""
        return {
            "trainer": self.trainer.state(),
            "mean_squares": dict(self.mean_squares),
            "joint": self.joint,
            "joint_losses": self.joint_losses,
            "seconds": self.seconds,
        }


@dataclass(frozen=True, slots=True)
class _Run:
    config: GateTraining
    bench: Workbench
    data: DataSets
    plan: Plan
    linears: tuple[FusedGates, ...]
    identity: str
    listener: Listener

    def run(self) -> dict[str, Any]:
        progress = self._trained()
        self._joined(progress)
        router = self._request_router() if self.config.request_router else None
        report = self._report(progress, router)
        told = {name: report[name] for name in ("steps", "seed", "tokens", "accuracy", "out_of_domain")}
        config = self.config
        gate_set = gate_set_of(
            self.bench, progress.trainer, progress.mean_squares, router, config.k, config.temperature, told
        )
        gate_set.write(config.out, "float16" if config.float16 else "float32")
        shutil.rmtree(config.checkpoint)
        return report

    def _trained(self) -> "_Progress":
        """All steps of the first stage taken, from the last checkpoint on."""
        options, device = self.config.options, self.bench.decoder.device
        trainer = GateTrainer(self.linears, self.bench.null + 1, options, device)
        features = SampleFeatures(
            self.bench,
            self.plan,
            self.data.shared,
            self.config.null_weight,
            lambda step: self._own_routing(trainer, step),
        )
        state = load_checkpoint(self.config.checkpoint, self.identity) if self.config.resume else None
        if state is None:
            first = range(min(CALIBRATION_STEPS, options.steps))
            trainer.calibrate(mean_squares_of([features.batch(step) for step in first], self.linears, device))
            mean_squares = mean_squares_of([self._unshared(step) for step in first], self.linears, device)
            progress = _Progress(trainer, mean_squares)
        else:
            trainer.load_state(state["trainer"])
            progress = _Progress(
                trainer, state["mean_squares"], state["joint"], state["joint_losses"], state["seconds"]
            )
        while trainer.num_steps < options.steps:
            started = time.monotonic()
            report = trainer.step(features.batch(trainer.num_steps))
            progress.seconds += time.monotonic() - started
            self.listener.stepped(trainer.num_steps, options.steps, report)
            self._save_sometimes(trainer.num_steps, options.steps, progress)
        return progress

    def _own_routing(self, trainer: GateTrainer, step: int) -> Auto | None:
        """Later layers see what earlier gates did. In the last steps that is what they do when they are served."""
        config = self.config
        if step < config.options.steps * (1 - config.own_routing):
            return None
        return Auto(gate_table(trainer), min(config.k, trainer.num_columns), config.temperature)

    def _joined(self, progress: "_Progress") -> None:
        """All steps of the second stage taken."""
        config = self.config
        if not config.joint_steps:
            return
        plan = Plan(tuple(replace(group, per_step=1) for group in self.plan.groups), config.options.seed + 1)
        joint = JointTrainer(
            self.bench,
            progress.trainer,
            k=config.k,
            temperature=config.temperature,
            beta=config.joint_beta,
            null_weight=config.null_weight,
        )
        if progress.joint is not None:
            joint.load_state(progress.joint)
        while joint.num_steps < config.joint_steps:
            started = time.monotonic()
            report = joint.step(plan.samples(joint.num_steps))
            progress.seconds += time.monotonic() - started
            self.listener.joint_stepped(joint.num_steps, config.joint_steps, report)
            progress.joint = joint.state()
            progress.joint_losses.append([report.language, report.gates])
            self._save_sometimes(joint.num_steps, config.joint_steps, progress)
        joint.close()

    def _save_sometimes(self, step: int, steps: int, progress: "_Progress") -> None:
        if step % self.config.checkpoint_every == 0 or step == steps:
            save_checkpoint(self.config.checkpoint, self.identity, progress.state())

    def _unshared(self, step: int) -> Any:
        """A step's rows but for the shared ones: their first token is unlike all others, in size as well."""
        cut = len(self.data.shared)
        return batch_of(self.bench, self.plan.samples(step), self.data.shared, lambda _, place: place >= cut)

    def _request_router(self) -> RequestRouter:
        found = [sample for samples in self.data.train.values() for sample in _prompts(samples, self.bench.null)]
        try:
            return fit(found, self.bench.null, seed=self.config.options.seed)
        except ValueError as error:
            raise InvalidRequest(
                f"the request router cannot be trained: {error}; or give --no-request-router"
            ) from error

    def _report(self, progress: "_Progress", router: RequestRouter | None) -> dict[str, Any]:
        trainer = progress.trainer
        columns = names_of_columns(self.bench)
        held_out = self.data.held_out
        decided = decisions_of(self.bench, self.data, trainer, self.config, self.listener.told)
        tasks = task_scores(self.bench, self.data, trainer, self.config, self.listener.told)
        generic = tasks.pop(GENERIC)
        return {
            "base": self.bench.spec.name,
            "columns": list(columns),
            "steps": trainer.num_steps,
            "seed": self.config.options.seed,
            "minutes": round(progress.seconds / 60, 1),
            "joint": [dict(zip(("language", "gates"), losses, strict=True)) for losses in progress.joint_losses],
            "tokens": {name: sum(map(len, samples)) for name, samples in self.data.train.items()},
            "accuracy": {kind: decisions.accuracy for kind, decisions in decided.items()},
            "out_of_domain": generic,
            "tasks": tasks,
            "request_router": None if router is None else _judged(router, held_out, self.bench.null),
            "routing": {kind: as_report(decisions, columns) for kind, decisions in decided.items()},
        }


def _prompts(samples: Sequence[Sample], null: int) -> list[RouterSample]:
    """What stands before the first answer, where one column is right for all of it and its answer."""
    found = []
    for sample in samples:
        column = sample.only_column(null)
        if column is not None and True in sample.answer:
            prompt = sample.token_ids[: sample.answer.index(True)]
            found.append(RouterSample(prompt, BASE if column == null else column))
    return found


def _judged(router: RequestRouter, held_out: Mapping[str, Sequence[Sample]], null: int) -> dict[str, Any]:
    """How often the request-level router decides, and is right where it does, on held-out prompts."""
    allowed = [*range(null), BASE]
    judged = {}
    for name, samples in held_out.items():
        asked = [(one.column, router.decide(one.token_ids, allowed)) for one in _prompts(samples, null)]
        decided = [right == column for right, column in asked if column is not None]
        judged[name] = {"prompts": len(asked), "decided": len(decided), "right": sum(decided)}
    return judged

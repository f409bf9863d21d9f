"""All samples of a run: what trains, what is held out, and the base's answers to generic prompts."""

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from perseid_server.errors import InvalidRequest
from perseid_server.training.completions import complete
from perseid_server.training.config import GateTraining
from perseid_server.training.data import DataReader, Unanswered
from perseid_server.training.files import write_whole
from perseid_server.training.plan import Group, Plan
from perseid_server.training.samples import Sample, shared_prefix, without_labels_before
from perseid_server.training.workbench import Workbench

GENERIC = "generic"
Told = Callable[[str, int, int], None]
"""Hears (what is done, how much of it, out of how much)."""


@dataclass(frozen=True, slots=True)
class DataSets:
    """By name: adapters, files with segments, and GENERIC last. The shared tokens teach nothing."""

    train: Mapping[str, tuple[Sample, ...]]
    held_out: Mapping[str, tuple[Sample, ...]]
    shared: tuple[int, ...]

    def plan(self, config: GateTraining) -> Plan:
        """The samples of every step."""
        groups = [
            Group(samples, config.generic_per_step if name == GENERIC else config.samples_per_step)
            for name, samples in self.train.items()
        ]
        return Plan(tuple(groups), config.options.seed)


def files_of(config: GateTraining) -> tuple[Path, ...]:
    """Every data file of a run. InvalidRequest for one that is not there."""
    paths = [path for _, path in (*config.data, *config.held_out)]
    paths += [config.generic or shipped("generic"), config.generic_held_out or shipped("generic_held_out")]
    for path in paths:
        if not path.is_file():
            raise InvalidRequest(f"{path}: no such file; expected JSON lines", field="data")
    return tuple(paths)


def shipped(name: str) -> Path:
    """A file of prompts that comes with Perseid."""
    return Path(str(resources.files("perseid_router.training") / f"{name}.jsonl"))


def read_datasets(config: GateTraining, bench: Workbench, told: Told) -> DataSets:
    """Read and split everything, and let the base answer what has no answer. InvalidRequest names file and line."""
    columns = {adapter.name: column for column, adapter in enumerate(bench.adapters)}
    reader = DataReader(bench.text, columns, bench.null, config.max_tokens - config.generic_tokens)
    train, held_out = _split(config, _read(reader, config.data, columns), _read(reader, config.held_out, columns))
    _refuse_untaught(bench, train)
    for part, role, path in (
        (train, "generic", config.generic or shipped("generic")),
        (held_out, "generic_held_out", config.generic_held_out or shipped("generic_held_out")),
    ):
        found = reader.read(path, GENERIC, bench.null)
        part[GENERIC] = tuple(_answered(config, bench, found, config.checkpoint / f"{role}.json", told))
    shared = shared_prefix([sample for part in (train, held_out) for samples in part.values() for sample in samples])

    def ready(part: Mapping[str, tuple[Sample, ...]]) -> dict[str, tuple[Sample, ...]]:
        cut = len(shared)
        return {name: tuple(without_labels_before(one, cut, bench.null) for one in part[name]) for name in part}

    return DataSets(ready(train), ready(held_out), shared)


def _read(
    reader: DataReader, files: Sequence[tuple[str, Path]], columns: Mapping[str, int]
) -> dict[str, tuple[Sample, ...]]:
    found: dict[str, tuple[Sample, ...]] = {}
    for name, path in files:
        if name == GENERIC:
            raise InvalidRequest(f"--data {name}={path}: use --generic for prompts of the base", field="data")
        samples = reader.read(path, name, columns.get(name))
        found[name] = (*found.get(name, ()), *(one for one in samples if isinstance(one, Sample)))
    return found


def _split(
    config: GateTraining, data: dict[str, tuple[Sample, ...]], beside: dict[str, tuple[Sample, ...]]
) -> tuple[dict[str, tuple[Sample, ...]], dict[str, tuple[Sample, ...]]]:
    """(train, held out): a share of what has no held-out file of its own."""
    train, held_out = {}, dict(beside)
    for name, samples in data.items():
        if name in beside:
            train[name] = samples
            continue
        count = int(len(samples) * config.held_out_share)
        order = list(range(len(samples)))
        random.Random(f"{config.options.seed} {name}").shuffle(order)  # noqa: S311  not a secret
        train[name] = tuple(samples[index] for index in sorted(order[count:]))
        held_out[name] = tuple(samples[index] for index in sorted(order[:count]))
    return train, held_out


def _refuse_untaught(bench: Workbench, train: Mapping[str, tuple[Sample, ...]]) -> None:
    """Every adapter needs tokens that teach it."""
    taught = {column for samples in train.values() for one in samples for column in one.columns}
    for column, adapter in enumerate(bench.adapters):
        if column not in taught:
            raise InvalidRequest(
                f"--data: adapter {adapter.name!r} has no training data; give --data {adapter.name}=FILE, or leave "
                "the adapter out",
                field="data",
            )


def _answered(
    config: GateTraining, bench: Workbench, found: Sequence[Sample | Unanswered], cache: Path, told: Told
) -> list[Sample]:
    """The samples, answered by the base where need be. What it said is kept for a resumed run."""
    prompts = [one for one in found if isinstance(one, Unanswered)]
    asked = _digest(bench.spec.hash, config.generic_tokens, prompts)
    answers = _kept_answers(cache, asked) if config.resume else None
    if answers is None:
        answers = complete(
            bench,
            [prompt.token_ids for prompt in prompts],
            config.generic_tokens,
            lambda done: told("the base answers generic prompts", done, len(prompts)),
        )
        write_whole(cache, json.dumps({"asked": asked, "answers": answers}).encode())
    rest = iter(answers)
    return [one if isinstance(one, Sample) else one.answered(next(rest), bench.null) for one in found]


def _digest(base: str, max_tokens: int, prompts: Sequence[Unanswered]) -> str:
    """What decides the base's answers."""
    return hashlib.sha256(json.dumps([base, max_tokens, [one.token_ids for one in prompts]]).encode()).hexdigest()


def _kept_answers(cache: Path, asked: str) -> list[tuple[int, ...]] | None:
    """Answers to the same prompts by the same base; None where there are none."""
    if not cache.is_file():
        return None
    kept = json.loads(cache.read_bytes())
    return [tuple(answer) for answer in kept["answers"]] if kept["asked"] == asked else None

"""What a run is judged by, on held-out samples: single decisions of gates, and answers under gates."""

from typing import Any

from perseid_router.training.accuracy import DecisionMeter, Decisions
from perseid_router.training.trainer import GateTrainer
from perseid_server.training.config import GateTraining
from perseid_server.training.datasets import DataSets, Told
from perseid_server.training.features import batch_of
from perseid_server.training.gates import names_of_columns
from perseid_server.training.routed import Auto, gate_table
from perseid_server.training.scores import SAMPLES_OF_PASS, Score, score
from perseid_server.training.workbench import Workbench


def decisions_of(
    bench: Workbench, data: DataSets, trainer: GateTrainer, config: GateTraining, told: Told
) -> dict[str, Decisions]:
    """Decisions on inputs of samples run with their right adapters: of all tokens after the shared ones, and of those
    that predict an answer's tokens."""
    meters = {kind: DecisionMeter(trainer, config.k, config.temperature) for kind in ("all", "answers")}
    samples = [sample for of_name in data.held_out.values() for sample in of_name]
    cut = len(data.shared)
    for start in range(0, len(samples), SAMPLES_OF_PASS):
        part = samples[start : start + SAMPLES_OF_PASS]

        def counts(index: int, place: int, part: list[Any] = part) -> bool:
            return index >= 0 and place >= cut and bool(part[index].train[place])

        batch = batch_of(bench, part, data.shared, counts)
        rows = zip(batch.rows.samples, batch.rows.places, strict=True)
        shown = [where for where in rows if counts(*where)]
        answers_R = batch.labels_R.new_tensor([part[index].predicts_answer(place) for index, place in shown]).bool()

        def observe(layer: int, fused: str, x_RK: Any, batch: Any = batch, answers_R: Any = answers_R) -> None:
            meters["all"].count(layer, fused, x_RK, batch.labels_R)
            meters["answers"].count(layer, fused, x_RK[answers_R], batch.labels_R[answers_R])

        batch.show(observe)
        told("routing on held-out data", min(start + SAMPLES_OF_PASS, len(samples)), len(samples))
    return {kind: meter.decisions() for kind, meter in meters.items()}


def task_scores(
    bench: Workbench, data: DataSets, trainer: GateTrainer, config: GateTraining, told: Told
) -> dict[str, dict[str, Any]]:
    """By data set: the answers of the base, of the right adapters, and of gates with k = 1 and the k asked for."""
    table = gate_table(trainer)
    ways: dict[str, Any] = {"base": "base", "oracle": "oracle"}
    ways |= {f"auto k={k}": Auto(table, k, config.temperature) for k in sorted({1, config.k})}
    found: dict[str, dict[str, Any]] = {}
    names = names_of_columns(bench)
    for place, (name, samples) in enumerate(data.held_out.items(), 1):
        if any(True in sample.answer for sample in samples):
            scores = {way: score(bench, samples, data.shared, how) for way, how in ways.items()}
            found[name] = {way: _told(each, names) for way, each in scores.items()}
        told("answers on held-out data", place, len(data.held_out))
    return found


def _told(score_of: Score, names: Any) -> dict[str, Any]:
    told: dict[str, Any] = {"tokens": round(score_of.tokens, 4), "exact": round(score_of.exact, 4)}
    if score_of.shares:
        told["shares"] = {name: round(share, 4) for name, share in zip(names, score_of.shares, strict=True)}
    return told

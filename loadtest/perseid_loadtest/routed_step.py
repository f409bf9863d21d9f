"""What routing costs a decode step: gates choose k of N adapters in every linear, beside adapters asked for by name.

    make router-bench                          # 16 requests, N = 4, 8, 28, 64
    make router-bench ARGS="--adapters 8 --rounds 9"

Adapters are random, rank 8 on all linears, and so are the gates: they choose evenly, which is the most work. The engine
runs in this process; within a round every kind of request follows the other at once, so that what else the machine
does falls on all of them. Ratios are taken round by round.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

from perseid_loadtest.report import machine
from perseid_loadtest.rounds import Summary, rotated
from perseid_router.gate_set import Column, Gate, GateSet, GateSetConfig
from perseid_server.adapters.store import version_of
from perseid_server.engine.adaptation import BASE_COLUMN, Adaptation, Routing
from perseid_server.engine.build import build_engine
from perseid_server.engine.config import EngineConfig
from perseid_server.engine.engine import Engine
from perseid_server.engine.messages import Submit
from perseid_server.model.sampling_params import SamplingParams
from perseid_server.model.spec import PARENT_OF_PROJECTION, BaseSpec

RANK = 8
PROMPT, TOKENS = 64, 48
PAGE_MIB = 21  # of the embedded base
KINDS = ("base", "explicit", "routed, k = 1", "routed, k = 2", "half routed")


@dataclass(frozen=True, slots=True)
class Cost:
    """One kind of request over N adapters."""

    adapters: int
    kind: str
    step_ms: Summary
    ratio: Summary  # of the step to the explicit requests' step


@dataclass(frozen=True, slots=True)
class Stage:
    """An engine that knows N adapters, and a gate set over them and the base."""

    engine: Engine
    versions: tuple[str, ...]
    gate_set: str

    def adaptation(self, kind: str, row: int) -> Adaptation:
        """What a row of the batch asks for."""
        if kind == "base":
            return Adaptation()
        if kind == "explicit" or (kind == "half routed" and row % 2):
            return Adaptation.of(self.versions[row % len(self.versions)])
        columns = (*self.versions, BASE_COLUMN)
        return Adaptation(routing=Routing(self.gate_set, columns, 1 if kind.endswith("1") else 2, 1.0))


def build_stage(count: int, folder: Path) -> Stage:
    """Random adapters and gates in `folder`, and an engine with room for all of them."""
    built = build_engine(EngineConfig(adapter_memory=max(count, 2) * PAGE_MIB, adapter_host_memory=4096))
    spec, rng = built.ready.spec, np.random.default_rng(count)
    versions = []
    for index in range(count):
        made = _random_adapter(folder / f"adapter-{index}", spec, rng)
        versions.append(version_of(made))
        built.engine.register_adapter(versions[-1], str(made))
    gates = folder / "gates"
    _random_gates(versions, spec, rng).write(gates)
    gate_set = version_of(gates)
    built.engine.register_gate_set(gate_set, str(gates), tuple(versions), null=True, pinned=True)
    return Stage(built.engine, tuple(versions), gate_set)


def step_ms(stage: Stage, kind: str, rows: int, turn: int) -> float:
    """Median milliseconds of the steps in which all rows decode."""
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    draw = np.random.default_rng([turn, KINDS.index(kind)])
    for row in range(rows):
        prompt = tuple(draw.integers(1000, 20000, PROMPT).tolist())
        stage.engine.submit(Submit(str(row), prompt, sampling, stage.adaptation(kind, row)))
    steps = []
    while stage.engine.has_work:
        started = time.perf_counter()
        outputs = stage.engine.step()
        for output in outputs.outputs:
            if output.error is not None:
                raise RuntimeError(output.error)
        if outputs.iteration_tokens == rows == len(outputs.outputs):
            steps.append(time.perf_counter() - started)
        elif outputs.iteration_tokens == 0:
            time.sleep(0.001)  # adapters are on their way
    return 1e3 * statistics.median(steps)


def measure(stage: Stage, rows: int, rounds: int, tell: Callable[[str], None]) -> list[Cost]:
    """All kinds, `rounds` times after one that warms up."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(rounds + 1):
        tell(f"{len(stage.versions)} adapters, " + (f"round {turn} of {rounds}" if turn else "warming up"))
        for kind in rotated(KINDS, turn):
            milliseconds = step_ms(stage, kind, rows, turn)
            if turn:
                found[kind].append(milliseconds)
    explicit = found["explicit"]
    return [
        Cost(
            len(stage.versions),
            kind,
            Summary.of(values),
            Summary.of([one / other for one, other in zip(values, explicit, strict=True)]),
        )
        for kind, values in found.items()
    ]


def table_of(costs: Sequence[Cost], rows: int) -> Table:
    """A row for each N and kind."""
    table = Table(title=f"a decode step of {rows} requests · {machine()}")
    for heading in ("adapters", "requests are", "step ms", "÷ explicit", "spread of the ratio"):
        table.add_column(heading, justify="left" if heading == "requests are" else "right")
    for cost in costs:
        table.add_row(
            str(cost.adapters),
            cost.kind,
            f"{cost.step_ms.median:.2f}",
            f"{cost.ratio.median:.2f}",
            f"{100 * cost.ratio.spread:.0f} %",
            end_section=cost.kind == KINDS[-1],
        )
    return table


def _random_adapter(folder: Path, spec: BaseSpec, rng: np.random.Generator) -> Path:
    folder.mkdir(parents=True)
    tensors = {}
    for layer in range(spec.num_layers):
        for projection, shape in spec.projections.items():
            name = f"base_model.model.model.layers.{layer}.{PARENT_OF_PROJECTION[projection]}.{projection}"
            for side, (height, width) in {
                "A": (RANK, shape.in_features),
                "B": (shape.out_features, RANK),
            }.items():
                values = rng.standard_normal((height, width), dtype=np.float32)
                tensors[f"{name}.lora_{side}.weight"] = (0.02 * values).astype(np.float16)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(spec.projections)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def _random_gates(versions: Sequence[str], spec: BaseSpec, rng: np.random.Generator) -> GateSet:
    config = GateSetConfig(tuple(Column(f"adapter-{index}", version) for index, version in enumerate(versions)))
    weights = {
        (layer, projection): _random_gate(config.num_columns, shape.in_features, rng)
        for layer in range(spec.num_layers)
        for projection, shape in spec.projections.items()
    }
    return GateSet(config, weights)


def _random_gate(columns: int, num_inputs: int, rng: np.random.Generator) -> Gate:
    weight = rng.standard_normal((columns, num_inputs), dtype=np.float32) / np.float32(num_inputs**0.5)
    return Gate(weight, np.zeros(columns, np.float32))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, nargs="+", default=[4, 8, 28, 64], metavar="N")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    console, costs = Console(), []
    for count in options.adapters:
        with tempfile.TemporaryDirectory() as scratch, console.status("") as status:
            costs += measure(build_stage(count, Path(scratch)), options.rows, options.rounds, status.update)
    console.print(table_of(costs, options.rows))
    if options.json is not None:
        found = {"machine": machine(), "rows": options.rows, "costs": [asdict(cost) for cost in costs]}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

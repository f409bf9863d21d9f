"""From trained gates to a gate set's folder, and which gates there are to train."""

from collections.abc import Sequence
from typing import Any

from perseid_router.gate_set import Column, Gate, GateSet, GateSetConfig
from perseid_router.request_router import RequestRouter
from perseid_router.training.features import FusedGates
from perseid_router.training.trainer import GateTrainer, MeanSquares
from perseid_server.adapters.lora import Site
from perseid_server.model.spec import FUSED_LINEARS
from perseid_server.training.workbench import Workbench


def gates_to_train(bench: Workbench) -> tuple[FusedGates, ...]:
    """A gate for every projection that some adapter changes: elsewhere all columns are the base."""
    spec = bench.spec
    adapted = frozenset(site for adapter in bench.adapters for site in adapter.sites)
    found = []
    for fused, names in FUSED_LINEARS.items():
        gated = tuple(tuple(Site(layer, name) in adapted for name in names) for layer in range(spec.num_layers))
        if any(any(layer) for layer in gated):
            found.append(FusedGates(fused, names, spec.fused_shape(fused).in_features, gated))
    return tuple(found)


def gate_set_of(
    bench: Workbench,
    trainer: GateTrainer,
    mean_squares: MeanSquares,
    router: RequestRouter | None,
    k: int,
    temperature: float,
    training: dict[str, Any],
) -> GateSet:
    """The set in memory; `GateSet.write` makes the folder."""
    config = GateSetConfig(
        adapters=tuple(Column(adapter.name, adapter.version) for adapter in bench.adapters),
        k=min(k, trainer.num_columns),
        temperature=temperature,
        base=bench.spec.name,
        request_router=None if router is None else router.config(),
        training=training,
    )
    squares = {
        (layer, fused): of_layers[layer].cpu().numpy()
        for fused, of_layers in mean_squares.items()
        for layer, gated in enumerate(trainer.linears[fused].gated)
        if any(gated)
    }
    return GateSet(config, _gates(trainer), squares, {} if router is None else router.tensors())


def _gates(trainer: GateTrainer) -> dict[tuple[int, str], Gate]:
    gates = {}
    columns = trainer.num_columns
    for fused, linear in trainer.linears.items():
        weights, biases = (tensor.cpu().numpy() for tensor in trainer.served(fused))
        for layer, gated in enumerate(linear.gated):
            for place, projection in enumerate(linear.projections):
                if gated[place]:
                    rows = slice(place * columns, (place + 1) * columns)
                    gates[layer, projection] = Gate(weights[layer, rows], biases[layer, rows])
    return gates


def names_of_columns(bench: Workbench) -> Sequence[str]:
    """Adapters in order, then the base."""
    return [*(adapter.name for adapter in bench.adapters), "base"]

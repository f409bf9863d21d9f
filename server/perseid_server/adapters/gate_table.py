"""Gates on the device: a checked file's, and training-free ones of adapters that join, as one table.

Columns are the file's adapters, then the joined ones, then the base. A projection is gated where the file gates it or a
joined adapter adapts it. There

- the file's rows are taken as they are; but where adapters join, relative to the base's row (to the mean of all rows in
  a set without a base). That adds the same to every logit, so it changes nothing among them, and puts the base at 0 for
  every input, where the joined columns expect it;
- a joined adapter's row is Arrow's (`perseid_router.arrow`): positive, so preferred to the base, where the input is
  untypically large along the adapter's own direction;
- a joined adapter that leaves the projection alone has no evidence there, for or against. It is never chosen (NEVER)
  while another column may be: it would take weight from others and add nothing;
- the file's adapters, where the file has no gate, are never chosen either: the file says that the base acts there.

Without a file all adapters' columns are training-free, and the base's logit is 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from perseid_kernels.routing import Gates, GateTable
from perseid_router.arrow import arrow_gate
from perseid_router.gate_set import NEVER, Gate
from perseid_server.adapters.gate_set_file import CheckedGateSet
from perseid_server.adapters.lora import Site
from perseid_server.adapters.lowering import LoweredLinear
from perseid_server.model.spec import FUSED_LINEARS, BaseSpec

MeanSquares = Mapping[tuple[int, str], NDArray[np.float32]]
"""E[x²] of the inputs of fused linears: (layer, fused) → [d_in]."""


def build_table(
    base: BaseSpec,
    checked: CheckedGateSet | None,
    joined: Sequence[Sequence[LoweredLinear]],
    null: bool,
    device: torch.device,
    mean_squares: MeanSquares | None = None,
) -> GateTable:
    """The table, in float32. `null`: whether the last column is the base.

    `mean_squares` stand in where the file has none. ValueError for no column at all, and for a base column where the
    file's gates were made without one: there is no logit for it.
    """
    if null and checked is not None and not checked.config.null:
        raise ValueError("the gate set has no column for the base")
    num_file = len(checked.config.adapters) if checked is not None else 0
    num_columns = num_file + len(joined) + null
    if num_columns == 0:
        raise ValueError("a gate table needs a column")
    plan = _Plan(base, checked, tuple(_by_place(linears) for linears in joined), null, num_columns, mean_squares or {})
    absolute = [checked is not None and checked.config.method == "arrow"] * num_file + [True] * len(joined)
    absolute += [False] * null
    layers = tuple(
        {fused: gates for fused in FUSED_LINEARS if (gates := plan.gates(layer, fused, device)) is not None}
        for layer in range(base.num_layers)
    )
    return GateTable(layers, torch.tensor(absolute, dtype=torch.int32, device=device), num_columns)


def _by_place(linears: Sequence[LoweredLinear]) -> dict[tuple[int, str], LoweredLinear]:
    return {(linear.layer, linear.fused): linear for linear in linears}


@dataclass(frozen=True, slots=True)
class _Plan:
    """All that decides the rows of a fused linear."""

    base: BaseSpec
    checked: CheckedGateSet | None
    joined: tuple[Mapping[tuple[int, str], LoweredLinear], ...]
    null: bool
    num_columns: int
    mean_squares: MeanSquares

    def gates(self, layer: int, fused: str, device: torch.device) -> Gates | None:
        """The gates of one fused linear; None where no projection has any."""
        projections = FUSED_LINEARS[fused]
        found = [self._gate(layer, fused, slice_) for slice_ in range(len(projections))]
        if all(gate is None for gate in found):
            return None
        inputs = self.base.fused_shape(fused).in_features
        nothing = Gate(np.zeros((self.num_columns, inputs), np.float32), np.zeros(self.num_columns, np.float32))
        filled = [nothing if gate is None else gate for gate in found]
        return Gates(
            torch.from_numpy(np.concatenate([gate.weight for gate in filled])).to(device),
            torch.from_numpy(np.concatenate([gate.bias for gate in filled])).to(device),
            tuple(gate is not None for gate in found),
        )

    def _gate(self, layer: int, fused: str, slice_: int) -> Gate | None:
        """The gate of one projection, all columns."""
        site = Site(layer, FUSED_LINEARS[fused][slice_])
        in_file = self.checked is not None and site in self.checked.gates
        linears = [adapter.get((layer, fused)) for adapter in self.joined]
        pairs = [None if linear is None else linear.pairs[slice_] for linear in linears]
        if not in_file and all(pair is None for pair in pairs):
            return None
        weight = np.zeros((self.num_columns, self.base.fused_shape(fused).in_features), np.float32)
        bias = np.full(self.num_columns, NEVER, np.float32)
        if self.null:
            bias[-1] = 0
        if in_file:
            self._fill_from_file(site, weight, bias)
        first = self.num_columns - self.null - len(pairs)
        mean_square = self._mean_square(layer, fused) if pairs else None
        for column, pair in enumerate(pairs, first):
            gate = arrow_gate(pair.a, pair.b, mean_square) if pair is not None else None
            if gate is not None:
                weight[column], bias[column] = gate.weight, gate.bias
        return Gate(weight, bias)

    def _fill_from_file(self, site: Site, weight: NDArray[np.float32], bias: NDArray[np.float32]) -> None:
        """Writes the rows of the file's adapters, and the base's."""
        assert self.checked is not None
        gate = self.checked.gate(site)
        if self.joined and self.checked.config.method != "arrow":  # Arrow's base is at 0 already
            gate = _relative(gate, null=self.checked.config.null)
        num_adapters = len(self.checked.config.adapters)
        weight[:num_adapters], bias[:num_adapters] = gate.weight[:num_adapters], gate.bias[:num_adapters]
        if self.null:
            weight[-1], bias[-1] = gate.weight[-1], gate.bias[-1]

    def _mean_square(self, layer: int, fused: str) -> NDArray[np.float32] | None:
        stored = self.checked.mean_square(layer, fused) if self.checked is not None else None
        return self.mean_squares.get((layer, fused)) if stored is None else stored


def _relative(gate: Gate, *, null: bool) -> Gate:
    """All rows minus the base's, or minus their mean. Columns that are never chosen stay that, and do not count."""
    chosen = gate.bias > NEVER / 2
    if null:
        weight, bias = gate.weight[-1], gate.bias[-1]
    elif not chosen.any():
        return gate
    else:
        weight, bias = gate.weight[chosen].mean(axis=0), gate.bias[chosen].mean()
    return Gate(gate.weight - chosen[:, None] * weight, gate.bias - chosen * bias)

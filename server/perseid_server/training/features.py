"""`perseid_router.training.features` on the served decoder: samples run with the adapters their labels name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perseid_router.training.features import Observer, balanced_weights
from perseid_server.training.plan import Plan
from perseid_server.training.routed import Auto, routed_rows
from perseid_server.training.rows import Rows, lay_out
from perseid_server.training.samples import Sample
from perseid_server.training.workbench import Workbench


@dataclass(frozen=True, slots=True)
class SampleBatch:
    """Samples in one pass; `rows_R` of its rows are shown, with the columns that are right for them."""

    bench: Workbench
    shown: frozenset[tuple[int, str]]  # the linears that have gates
    rows: Rows
    rows_R: Tensor  # int64
    labels_R: Tensor  # int64
    weights_R: Tensor  # float32
    auto: Auto | None = None  # gates that route the pass, in place of the labels

    def show(self, observe: Observer) -> None:
        """Run the pass on the served weights."""
        bench = self.bench
        batch = self.rows.host.on(bench.decoder.device)
        if self.auto is not None:
            batch = replace(batch, routed=(routed_rows(bench, self.auto, len(self.rows.samples)),))
        with torch.inference_mode():
            bench.decoder.hidden(
                batch, bench.kv, bench.pool, lambda layer, fused, x_TK: self._show(observe, layer, fused, x_TK)
            )

    def _show(self, observe: Observer, layer: int, fused: str, x_TK: Tensor) -> None:
        if (layer, fused) in self.shown:
            observe(layer, fused, x_TK[self.rows_R])


@dataclass(frozen=True, slots=True)
class SampleFeatures:
    """The batches of a plan."""

    bench: Workbench
    plan: Plan
    shared: tuple[int, ...]  # tokens that all samples begin with: run on the base, and labelled so
    null_weight: float = 1.0
    own_routing: Callable[[int], Auto | None] = lambda _: None  # gates that route a step's pass; None: the labels do

    def batch(self, step: int) -> SampleBatch:
        """The samples of one step."""
        samples = self.plan.samples(step)

        def teaches(index: int, place: int) -> bool:
            if place < len(self.shared):  # the same in all samples: once is enough
                return index <= 0
            return samples[index].train[place]

        return batch_of(self.bench, samples, self.shared, teaches, self.null_weight, self.own_routing(step))


def batch_of(
    bench: Workbench,
    samples: Sequence[Sample],
    shared: Sequence[int],
    shown: Callable[[int, int], bool],
    null_weight: float = 1.0,
    auto: Auto | None = None,
) -> SampleBatch:
    """A pass over `samples`, with the adapters that labels name or `auto` chooses; `shown` says which rows (sample,
    place) are."""
    rows = lay_out(samples, shared, bench.block_size, bench.page_list if auto is None else lambda _: None)
    numbers = [row for row, where in enumerate(zip(rows.samples, rows.places, strict=True)) if shown(*where)]
    labels = [_label(bench, samples, rows.samples[row], rows.places[row]) for row in numbers]
    device = bench.decoder.device
    labels_R = torch.tensor(labels, dtype=torch.int64, device=device)
    weights_R = balanced_weights(labels_R, bench.null + 1, null_weight)
    return SampleBatch(
        bench, bench.gated, rows, torch.tensor(numbers, dtype=torch.int64, device=device), labels_R, weights_R, auto
    )


def _label(bench: Workbench, samples: Sequence[Sample], index: int, place: int) -> int:
    return bench.null if index < 0 else samples[index].columns[place]

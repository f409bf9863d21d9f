"""Gates under training as the decoder takes them: what `auto` would do with them now."""

from dataclasses import dataclass
from itertools import pairwise

import torch

from perseid_kernels.routing import Gates, GateTable, RoutedRows, column_pages
from perseid_router.training.trainer import GateTrainer
from perseid_server.training.workbench import Workbench


@dataclass(frozen=True, slots=True)
class Auto:
    """Gates decide, as for a request for `auto`."""

    table: GateTable
    k: int
    temperature: float


def gate_table(trainer: GateTrainer) -> GateTable:
    """The gates as they stand. Projections without gates have zero rows."""
    served = {fused: trainer.served(fused) for fused in trainer.linears}
    layers = max(len(linear.gated) for linear in trainer.linears.values())
    return GateTable(
        tuple(
            {
                fused: _gates(weights[layer], biases[layer], trainer.linears[fused].gated[layer], trainer.num_columns)
                for fused, (weights, biases) in served.items()
                if any(trainer.linears[fused].gated[layer])
            }
            for layer in range(layers)
        ),
        torch.zeros(trainer.num_columns, dtype=torch.int32, device=next(iter(trainer.biases.values())).device),
        trainer.num_columns,
    )


def _gates(weight: torch.Tensor, bias: torch.Tensor, gated: tuple[bool, ...], columns: int) -> Gates:
    kept = torch.tensor(gated, device=weight.device).repeat_interleave(columns)
    return Gates((weight * kept[:, None]).contiguous(), (bias * kept).contiguous(), gated)


def routed_rows(bench: Workbench, auto: Auto, num_rows: int) -> RoutedRows:
    """All rows of a pass, all columns allowed."""
    table, k, device = auto.table, auto.k, bench.decoder.device
    lists = [bench.page_list(column) for column in range(table.num_columns)]
    pages, indptr = column_pages([() if each is None else each.pages for each in lists])
    return RoutedRows(
        table=table,
        rows=torch.arange(num_rows, dtype=torch.int32, device=device),
        k=torch.full((num_rows,), k, dtype=torch.int32, device=device),
        temperature=torch.full((num_rows,), auto.temperature, dtype=torch.float32, device=device),
        allowed=torch.ones((num_rows, table.num_columns), dtype=torch.int32, device=device),
        pages=torch.tensor(pages, dtype=torch.int32, device=device),
        page_indptr=torch.tensor(indptr, dtype=torch.int32, device=device),
        max_pages=max((end - start for start, end in pairwise(indptr)), default=0),
        max_k=k,
        tally=torch.zeros((num_rows, table.num_columns + 1), dtype=torch.float32, device=device),
    )

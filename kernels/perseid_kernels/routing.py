"""Token-level routing: which adapters a row uses is decided on the device, by gates, in every linear (MeteoRA).

Each projection of each layer has a gate row for every column of its gate set. A column is an adapter, or the base
(the null column, which has no pages). For a routed row t and a projection with gates G [C, K], b [C]:

    l_c   = f_c(G_c · x[t]) + b_c                  f_c = |·| where `absolute`, else the identity
    I     = the k largest l_c among the columns allowed to row t; ties go to the lowest column
    w     = softmax over I of l_I / T
    y[t] += Σ_{c ∈ I, ascending} w_c · Σ_{j ∈ pages of c} (x[t] @ A[p_j]ᵀ) @ B[p_j]

x is the linear's own input; logits, softmax and sums are float32. A logit that is not finite counts as the largest or
the smallest number, NaN as the smallest: columns are always chosen. A projection without gates adds nothing. Columns
are added in ascending order, so one column of weight 1 gives the bits of the same adapter asked for by name.

Shape legend: T rows of the batch, R routed rows, S projections of a fused linear, C columns, K inputs.
Source: MeteoRA (arXiv:2405.13053); training-free columns: Arrow (arXiv:2405.11157).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perseid_kernels.rank_pages import RankPages
from perseid_kernels.segments import PAGE_RANK


@dataclass(frozen=True, slots=True, eq=False)
class Gates:
    """The gates of one fused linear: those of projection s are rows s·C … (s+1)·C."""

    weight: Tensor  # float32 [S · C, K]
    bias: Tensor  # float32 [S · C]
    gated: tuple[bool, ...]  # [S]: whether the projection has gates; where not, its rows are zero and nothing is added

    @property
    def num_gated(self) -> int:
        """Projections that have gates."""
        return sum(self.gated)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class GateTable:
    """A gate set on the device. Columns mean the same in all layers."""

    layers: tuple[Mapping[str, Gates], ...]  # by fused linear; those without any gate are left out
    absolute: Tensor  # int32 [C], 1 where f_c = |·|
    num_columns: int

    @property
    def num_gated(self) -> int:
        """Decisions that one row takes in a forward pass."""
        return sum(gates.num_gated for layer in self.layers for gates in layer.values())

    @property
    def nbytes(self) -> int:
        """Device bytes held."""
        return sum(gates.weight.nbytes + gates.bias.nbytes for layer in self.layers for gates in layer.values())


@dataclass(frozen=True, slots=True, eq=False)
class RoutedRows:
    """The rows of a step that one gate set routes. No row is in two of these, nor in a segment."""

    table: GateTable
    rows: Tensor  # int32 [R], ascending
    k: Tensor  # int32 [R], at least 1; where fewer columns are allowed, all of them are taken
    temperature: Tensor  # float32 [R], positive
    allowed: Tensor  # int32 [R, C], 1 where a column may be chosen; at least one of each row
    pages: Tensor  # int32 [ΣJ], those of column 0, then 1, …; the null column and columns allowed to nobody have none
    page_indptr: Tensor  # int32 [C+1]
    max_pages: int  # the most of any column
    max_k: int  # the largest k
    tally: Tensor  # float32 [R, C+1], added to: Σ over projections of w_c, and last of the entropy of l / T in nats


_MOST = torch.finfo(torch.float32).max


def route(logits_C: Tensor, allowed_C: Tensor, k: int, temperature: float) -> tuple[list[int], Tensor, float]:
    """The decision of one row and projection: chosen columns ascending, their weights, the entropy of all allowed.

    The oracle: computes in the dtype it is given.
    """
    logits_C = logits_C.nan_to_num(nan=-_MOST, posinf=_MOST, neginf=-_MOST)
    candidates = [column for column in range(logits_C.numel()) if allowed_C[column]]
    ranked = sorted(candidates, key=lambda column: (-float(logits_C[column]), column))
    chosen = sorted(ranked[:k])
    weights = torch.softmax(logits_C[chosen] / temperature, dim=0)
    shares = torch.softmax(logits_C[candidates] / temperature, dim=0)
    entropy = -float((shares * shares.clamp_min(torch.finfo(shares.dtype).tiny).log()).sum())
    return chosen, weights, entropy


def add_routed_oracle(
    x_TK: Tensor, gates: Gates, pages: RankPages, routed: RoutedRows, out_TN: Tensor, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """(y, tally) as new tensors of `dtype`: the equation above, a row and a projection at a time."""
    y, tally = out_TN.to(dtype).clone(), routed.tally.to(dtype).clone()
    columns = routed.table.num_columns
    absolute = routed.table.absolute.bool()
    for r, row in enumerate(routed.rows.tolist()):
        x = x_TK[row].to(dtype)
        start = 0
        for s, (width, gated) in enumerate(zip(pages.slices, gates.gated, strict=True)):
            end = start + width
            if gated:
                product = gates.weight[s * columns : (s + 1) * columns].to(dtype) @ x
                logits = torch.where(absolute, product.abs(), product) + gates.bias[s * columns : (s + 1) * columns]
                chosen, weights, entropy = route(
                    logits, routed.allowed[r], int(routed.k[r]), float(routed.temperature[r])
                )
                for column, weight in zip(chosen, weights, strict=True):
                    tally[r, column] += weight
                    for j in range(int(routed.page_indptr[column]), int(routed.page_indptr[column + 1])):
                        page = int(routed.pages[j])
                        a = pages.a[page, s * PAGE_RANK : (s + 1) * PAGE_RANK].to(dtype)
                        y[row, start:end] += weight * ((a @ x) @ pages.b[page, :, start:end].to(dtype))
                tally[r, columns] += entropy
            start = end
    return y, tally


def column_pages(pages_of_columns: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """(pages, page_indptr) of columns with these pages."""
    pages: list[int] = []
    indptr = [0]
    for of_column in pages_of_columns:
        pages += of_column
        indptr.append(len(pages))
    return pages, indptr

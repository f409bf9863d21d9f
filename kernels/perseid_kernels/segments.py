"""Which rows of a batch use which adapter pages: built once a step, used by every layer.

Rows that share a list of pages form a segment. A row that uses no adapter is in no segment and costs nothing.

    for segment s, for row t in rows[indptr[s] : indptr[s+1]]:
        y[t] += Σ_{j in page_indptr[s] … page_indptr[s+1]} weights[j] · (x[t] @ A[pages[j]]ᵀ) @ B[pages[j]]

An explicit adapter of rank r is one segment with ⌈r / PAGE_RANK⌉ pages of weight 1. A blend is the concatenation
of its adapters' pages with their weights. Source of the idea: Punica's SGMV (arXiv:2310.18547), with pages in
place of a maximum rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perseid_kernels.upload import upload

PAGE_RANK = 16
"""Rows of A (and of B) in one page. Ranks are padded with zeros to a multiple of it."""


@dataclass(frozen=True, slots=True)
class PageList:
    """The pages one row uses, in the order their products are summed. Hashable: equal lists share a segment."""

    pages: tuple[int, ...]
    weights: tuple[float, ...]

    @staticmethod
    def of(pages: Sequence[int]) -> "PageList":
        """One adapter with weight 1."""
        return PageList(tuple(pages), (1.0,) * len(pages))


@dataclass(frozen=True, slots=True)
class Segments:
    """S segments over R of the batch's T rows; J_s pages in segment s, J the most of any segment."""

    rows: Tensor  # int32 [R], row numbers; those of one segment stand together, ascending
    indptr: Tensor  # int32 [S+1], indptr[0] = 0, indptr[S] = R
    pages: Tensor  # int32 [ΣJ_s]
    weights: Tensor  # float32 [ΣJ_s]
    page_indptr: Tensor  # int32 [S+1]
    max_pages: int  # J
    max_rows: int  # rows of the longest segment
    sizes: tuple[tuple[int, int], ...] = ()  # (rows, pages) of each segment: a host copy that saves a device sync

    @staticmethod
    def build(lists: Sequence[PageList | None], device: torch.device | str = "cpu") -> "Segments | None":
        """`lists[t]` is what row t uses, None for the base. Returns None when no row uses an adapter."""
        rows_of: dict[PageList, list[int]] = {}
        for row, pages in enumerate(lists):
            if pages is not None and pages.pages:
                rows_of.setdefault(pages, []).append(row)
        if not rows_of:
            return None
        indptr, page_indptr = [0], [0]
        for pages, rows in rows_of.items():
            indptr.append(indptr[-1] + len(rows))
            page_indptr.append(page_indptr[-1] + len(pages.pages))

        def ints(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32)

        weights = [weight for pages in rows_of for weight in pages.weights]
        host = (
            ints([row for rows in rows_of.values() for row in rows]),
            ints(indptr),
            ints([page for pages in rows_of for page in pages.pages]),
            torch.tensor(weights, dtype=torch.float32),
            ints(page_indptr),
        )
        rows_R, starts, pages_J, weights_J, page_starts = upload(host, torch.device(device))
        return Segments(
            rows=rows_R,
            indptr=starts,
            pages=pages_J,
            weights=weights_J,
            page_indptr=page_starts,
            max_pages=max(len(pages.pages) for pages in rows_of),
            max_rows=max(len(rows) for rows in rows_of.values()),
            sizes=tuple((len(rows), len(pages.pages)) for pages, rows in rows_of.items()),
        )

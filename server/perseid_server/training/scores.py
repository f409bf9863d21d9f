"""Task scores under teacher forcing: is each token of the true answer the likeliest after the true ones before it?

An answer all of whose tokens are is the greedy answer, so the exact rate is that of greedy decoding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from perseid_server.training.routed import Auto, routed_rows
from perseid_server.training.rows import Rows, lay_out
from perseid_server.training.samples import Sample
from perseid_server.training.workbench import Workbench

SAMPLES_OF_PASS = 16


How = Literal["base", "oracle"] | Auto
"""Who answers: the base, the adapters that the labels name, or gates."""


@dataclass(frozen=True, slots=True)
class Score:
    """Of some samples."""

    tokens: float  # share of answer tokens predicted right
    exact: float  # share of answers all of whose tokens are
    shares: tuple[float, ...] = ()  # what gates chose: mean weight per column over all rows after the shared ones


def score(bench: Workbench, samples: Sequence[Sample], shared: Sequence[int], how: How) -> Score:
    """Run the samples, a few in each pass. The shared beginning is run as gates decide, for the others on the base; but
    for the oracle with a sample's one adapter, as a request that names it."""
    if how == "oracle":
        samples, shared = [sample.explicit(bench.null) for sample in samples], ()
    right = total = exact = 0
    tally = torch.zeros(bench.null + 2, dtype=torch.float64)
    for start in range(0, len(samples), SAMPLES_OF_PASS):
        part = samples[start : start + SAMPLES_OF_PASS]
        rows = _rows(bench, part, shared, how)
        hits, spent = _hits(bench, part, rows, how, len(shared))
        right += sum(sum(each) for each in hits)
        total += sum(len(each) for each in hits)
        exact += sum(all(each) for each in hits)
        tally += spent
    weight = tally[:-1]
    shares = tuple((weight / weight.sum()).tolist()) if weight.sum() > 0 else ()
    return Score(right / max(total, 1), exact / max(len(samples), 1), shares)


def _rows(bench: Workbench, part: Sequence[Sample], shared: Sequence[int], how: How) -> Rows:
    return lay_out(
        part,
        shared,
        bench.block_size,
        bench.page_list if how == "oracle" else lambda _: None,
        wanted=lambda index, place: part[index].predicts_answer(place),
    )


def _hits(
    bench: Workbench, part: Sequence[Sample], rows: Rows, how: How, num_shared: int
) -> tuple[list[list[bool]], Tensor]:
    """(whether each answer token was predicted, by sample; the tally of the rows after the shared ones)"""
    batch = rows.host.on(bench.decoder.device)
    if isinstance(how, Auto):
        routed = routed_rows(bench, how, len(rows.samples))
        batch = replace(batch, routed=(routed,))
    best = bench.decoder.bind(bench.kv, bench.pool)(batch).logits_LV.argmax(-1).tolist()
    hits: list[list[bool]] = [[] for _ in part]
    for row, token in zip(rows.host.logits_rows, best, strict=True):
        index, place = rows.samples[row], rows.places[row]
        hits[index].append(token == part[index].token_ids[place + 1])
    if not isinstance(how, Auto):
        return hits, torch.zeros(bench.null + 2, dtype=torch.float64)
    told = torch.tensor([place >= num_shared for place in rows.places])
    return hits, routed.tally.cpu().double()[told].sum(0)

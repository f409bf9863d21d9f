"""Whether the load generator kept up: where it did not, the figures are its own and not the server's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from perseid_loadtest.analysis import formatting
from perseid_loadtest.analysis.distribution import Distribution
from perseid_loadtest.traffic.record import RequestRecord, Run
from perseid_loadtest.traffic.target import CLIENT

BUSY = 0.85
"""Share of its core beyond which events wait for the load generator."""
LATE_S = 0.010
"""Lateness that a busy machine's timers have anyway."""
LATE_SHARE = 0.1
"""Of the median TTFT: lateness is part of it, and this much of it changes what the figure says."""


@dataclass(frozen=True, slots=True)
class ClientFigures:
    """The load generator's own."""

    busy: float  # share of its core
    most_late_s: float  # 99th percentile of sent − planned in an open loop
    verdict: str | None = None  # why it may have been the bottleneck; None: it was not


def client_figures(run: Run, records: Sequence[RequestRecord], ttft: Distribution | None) -> ClientFigures:
    """With the verdict, of the records that count. What is not finite was not measured: nothing."""
    busy, most_late_s = (value if math.isfinite(value) else 0.0 for value in (run.client_busy, run.most_late_s))
    reasons = []
    if busy >= BUSY:
        reasons.append(f"it used {formatting.percent(busy)} of its core")
    if most_late_s > max(LATE_S, LATE_SHARE * (ttft.p50 if ttft else 0.0)):
        reasons.append(f"one request in a hundred went out {formatting.seconds(most_late_s)} late or more")
    failed = sum(record.error == CLIENT for record in records)
    if failed:
        reasons.append(f"{failed:,} of {len(records):,} requests failed in it and not in the server")
    verdict = f"The load generator may be the bottleneck: {', and '.join(reasons)}." if reasons else None
    return ClientFigures(busy, most_late_s, verdict)

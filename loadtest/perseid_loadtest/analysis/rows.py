"""The figures of a run as rows, the same ones in the terminal, on the page and in comparisons."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from perseid_loadtest.analysis import formatting
from perseid_loadtest.analysis.adapter_figures import AdapterFigures, starved
from perseid_loadtest.analysis.distribution import Distribution
from perseid_loadtest.analysis.scraped import HistogramFigures
from perseid_loadtest.analysis.summary import ChurnFigures, Summary

Better = Literal["higher", "lower", ""]
BASE = "(base)"
"""How tables call requests without an adapter."""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure."""

    label: str
    value: float | None
    show: Callable[[float | None], str]
    better: Better = ""

    @property
    def text(self) -> str:
        """For people."""
        return self.show(self.value)


Cells = tuple[str, ...]
"""One line of a table."""
LATENCY_COLUMNS = ("", "mean", "p50", "p90", "p99", "max")
ADAPTER_COLUMNS = ("", "requests", "failed", "tokens", "TTFT p50", "p99", "s/token")
CHURN_COLUMNS = ("", "times", "failed", "p50", "p99", "max")


@dataclass(frozen=True, slots=True)
class LatencyRow:
    """One latency: what the client measured, and what the server did."""

    label: str
    client: Distribution | None
    server: HistogramFigures | None


def latency_rows(summary: Summary) -> list[LatencyRow]:
    """TTFT, ITL, TPOT and end to end."""
    server = summary.server
    return [
        LatencyRow("TTFT", summary.ttft, server.ttft),
        LatencyRow("ITL", summary.itl, server.itl),
        LatencyRow("TPOT", summary.tpot, server.tpot),
        LatencyRow("end to end", summary.e2e, server.e2e),
    ]


def latency_cells(summary: Summary) -> list[Cells]:
    """Each latency, and below it what the server says of it; without a largest value, which histograms do not keep."""
    lines = []
    for row in latency_rows(summary):
        client, server = row.client, row.server
        if client is not None:
            values = (client.mean, client.p50, client.p90, client.p99, client.max)
            lines.append((row.label, *map(formatting.seconds, values)))
        if server is not None:
            told = (server.mean, server.p50, server.p90, server.p99, None)
            lines.append((f"{row.label}, server", *map(formatting.seconds, told)))
    return lines


def adapter_cells(one: AdapterFigures) -> Cells:
    """Requests, tokens and latencies of one adapter."""
    counts = map(formatting.count, (one.requests, one.errors, one.output_tokens))
    return (
        name_of(one.adapter),
        *counts,
        *map(formatting.seconds, (one.ttft_p50, one.ttft_p99, one.normalised_latency)),
    )


def churn_cells(one: ChurnFigures) -> Cells:
    """How often one thing was done to adapters, and how long it took."""
    taken = (one.seconds.p50, one.seconds.p99, one.seconds.max) if one.seconds else (None, None, None)
    return (one.action, *map(formatting.count, (one.count, one.errors)), *map(formatting.seconds, taken))


def throughput_rows(summary: Summary) -> list[Row]:
    """Requests and tokens, and what was good of them."""
    rows = [
        Row("requests", summary.requests, formatting.count),
        Row("answered", summary.answered, formatting.count, "higher"),
        Row("failed", summary.failed, formatting.count, "lower"),
        Row("seconds of measuring", summary.seconds, formatting.number),
        Row("requests due/s", summary.offered_per_s, formatting.number),
        Row("requests/s", summary.requests_per_s, formatting.number, "higher"),
        Row("output tokens/s", summary.output_tokens_per_s, formatting.number, "higher"),
        Row("prompt tokens/s", summary.prompt_tokens_per_s, formatting.number, "higher"),
    ]
    if summary.goodput is not None:
        rows += [
            Row("goodput, requests/s", summary.goodput.requests_per_s, formatting.number, "higher"),
            Row("goodput, share", summary.goodput.share, formatting.percent, "higher"),
        ]
    rows += [
        Row("fairness (Jain)", summary.jain, formatting.ratio, "higher"),
        Row("load generator busy", summary.client.busy, formatting.percent),
        Row("lateness p99", summary.client.most_late_s, formatting.seconds),
    ]
    return rows


def server_rows(summary: Summary) -> list[Row]:
    """What /metrics tells beside latencies; only what is there."""
    server = summary.server
    rows = [
        Row("queue p50", server.queue.p50 if server.queue else None, formatting.seconds, "lower"),
        Row("queue p99", server.queue.p99 if server.queue else None, formatting.seconds, "lower"),
        Row("prompt tokens", server.prompt_tokens, formatting.count),
        Row("generated tokens", server.generation_tokens, formatting.count),
        Row("prefix cache hits", server.prefix_cache_hit_ratio, formatting.percent, "higher"),
        Row("adapter cache hits", server.lora_cache_hit_ratio, formatting.percent, "higher"),
        Row("drafts accepted", server.draft_acceptance, formatting.percent, "higher"),
        Row("preemptions", server.preemptions, formatting.count, "lower"),
        Row("engine restarts", server.engine_restarts, formatting.count, "lower"),
        Row("KV use at the end", server.kv_usage, formatting.percent),
        Row("running at the end", server.running, formatting.count),
        Row("waiting at the end", server.waiting, formatting.count),
    ]
    return [row for row in rows if row.value is not None]


def all_rows(summary: Summary) -> list[Row]:
    """Everything that two runs can be compared by: throughput, each latency's mean and percentiles, the server's."""
    latencies = [
        Row(f"{row.label} {name}", getattr(row.client, name) if row.client else None, formatting.seconds, "lower")
        for row in latency_rows(summary)
        for name in ("mean", "p50", "p90", "p99", "max")
    ]
    server = [
        Row(f"{row.label} {name}, server", getattr(row.server, name), formatting.seconds, "lower")
        for row in latency_rows(summary)
        if row.server is not None
        for name in ("p50", "p99")
    ]
    counted = [Row(f"{row.label}, server", row.value, row.show, row.better) for row in server_rows(summary)]
    return [*throughput_rows(summary), *latencies, *server, *counted]


def remarks(summary: Summary) -> list[str]:
    """What a reader has to know before trusting the figures."""
    told = []
    if summary.stopped_early is not None:
        told.append(f"Stopped early: {summary.stopped_early}")
    if summary.requests == 0:
        told.append("No request was measured.")
    elif summary.answered == 0:
        told.append("No request was answered.")
    told += _of_answers(summary)
    left = starved(summary.adapters)
    if left and summary.answered:
        told.append(f"Never answered, and unknown to the fairness index: {listed(left)}.")
    if summary.server_untold is not None:
        told.append(f"No figures by the server: {summary.server_untold}.")
    if summary.client.verdict is not None:
        told.append(summary.client.verdict)
    if summary.not_put_back:
        failed = [
            f"{one.action} {name_of(one.adapter)} ({formatting.printable(one.error or '')})"
            for one in summary.not_put_back
        ]
        told.append(f"Still changed on the server, since this failed: {listed(failed)}.")
    return [formatting.printable(line) for line in told]


def _of_answers(summary: Summary) -> list[str]:
    """Where their tokens are not what was planned, or not known."""
    told = []
    if summary.empty:
        told.append(f"{summary.empty} of {summary.answered} answers held no token.")
    if summary.uncounted:
        told.append(
            f"The server did not count the tokens of {summary.uncounted} of {summary.answered} answers: each chunk of "
            "text, or whole answer, counts as one."
        )
    if summary.stops_at_eos:
        told.append(
            "The server refuses ignore_eos: answers end where it ends them, so their lengths are not as planned."
        )
    return told


def name_of(adapter: str) -> str:
    """An adapter as tables call it."""
    return formatting.printable(adapter, 120) or BASE


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names, the first of many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name_of(name) for name in names[:most]) + more

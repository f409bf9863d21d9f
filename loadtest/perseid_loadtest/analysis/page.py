"""A run as one HTML page that needs nothing else: figures, plots, options."""

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from perseid_loadtest.analysis import formatting, markup, plots
from perseid_loadtest.analysis.files import Saved, write_whole
from perseid_loadtest.analysis.rows import (
    ADAPTER_COLUMNS,
    CHURN_COLUMNS,
    LATENCY_COLUMNS,
    adapter_cells,
    churn_cells,
    latency_cells,
    remarks,
    server_rows,
    throughput_rows,
)
from perseid_loadtest.analysis.summary import Summary
from perseid_loadtest.traffic.record import Run

MOST_ADAPTERS = 200
"""In the table; more make the page slow to read, and the file has them all."""


def write_page(path: Path, saved: Saved) -> None:
    """Write the page, whole or not at all. InvalidRequest where plotly is missing or the file cannot be written."""
    plots.check_plotly()
    write_whole(path, markup.document(f"Load test of {saved.run.target}", _body(saved)))


def about(run: Run) -> str:
    """What was measured when."""
    return f"{run.target} · {moment(run.started_at)} · {formatting.seconds(run.seconds)}"


def moment(unix: float) -> str:
    """A date and time in UTC; a dash for what is none."""
    try:
        return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return formatting.NOTHING


def value_text(value: Any) -> str:
    """An option's value as it would be written."""
    if isinstance(value, str):
        return value
    return formatting.NOTHING if value is None else json.dumps(value, ensure_ascii=False, default=str)


def _body(saved: Saved) -> Iterator[str]:
    run, summary = saved.run, saved.summary
    runs = [("", run)]
    yield "<h1>Load test</h1>"
    yield markup.note(about(run), "about")
    if summary.goodput is not None:
        yield markup.note(f"Good: {summary.goodput.slo.describe()}", "about")
    for remark in remarks(summary):
        yield markup.note(remark, "remark")
    yield markup.tiles(_headline(summary))
    yield markup.section(
        "Latency",
        markup.note("From the planned arrival, of answered requests."),
        markup.table(LATENCY_COLUMNS, latency_cells(summary)),
        markup.plot(plots.latency_cdfs(runs), "cdf"),
    )
    yield markup.section("Latency over time", markup.plot(plots.latency_over_time(runs), "latency"))
    yield markup.section("Throughput over time", markup.plot(plots.throughput_over_time(runs), "throughput"))
    yield markup.section("Adapters", markup.plot(plots.by_adapter([("", summary)]), "adapters"), *_adapters(summary))
    if summary.errors:
        yield markup.section("Errors", markup.plot(plots.errors_over_time(run), "errors"), _errors(summary))
    if summary.churn:
        yield markup.section("Adapters changed meanwhile", _churn(summary))
    yield markup.section("Figures", markup.table(("", ""), [(row.label, row.text) for row in throughput_rows(summary)]))
    rows = [(row.label, row.text) for row in server_rows(summary)]
    yield markup.section("By the server, during the run", markup.table(("", ""), rows))
    yield markup.section("Options", options_table(run.options))


def options_table(options: Mapping[str, Any]) -> str:
    """What was asked for."""
    return markup.table(("", ""), [(name, value_text(value)) for name, value in options.items()], words=(0, 1))


def _headline(summary: Summary) -> list[tuple[str, str]]:
    return [
        ("requests/s", formatting.number(summary.requests_per_s)),
        ("output tokens/s", formatting.number(summary.output_tokens_per_s)),
        ("TTFT p99", formatting.seconds(summary.ttft.p99 if summary.ttft else None)),
        ("ITL p99", formatting.seconds(summary.itl.p99 if summary.itl else None)),
        ("end to end p99", formatting.seconds(summary.e2e.p99 if summary.e2e else None)),
        ("of the requests good", formatting.percent(summary.goodput.share if summary.goodput else None)),
        ("failed", formatting.count(summary.failed)),
    ]


def _adapters(summary: Summary) -> Iterator[str]:
    yield markup.table(ADAPTER_COLUMNS, map(adapter_cells, summary.adapters[:MOST_ADAPTERS]))
    if len(summary.adapters) > MOST_ADAPTERS:
        yield markup.note(f"And {len(summary.adapters) - MOST_ADAPTERS} more.")
    if summary.jain is not None:
        yield markup.note(
            f"Jain's index of latency ÷ token over adapters: {formatting.ratio(summary.jain)}; 1 is even."
        )


def _errors(summary: Summary) -> str:
    rows = [(error.kind, formatting.count(error.count), error.example) for error in summary.errors]
    return markup.table(("kind", "requests", "for example"), rows, words=(0, 2))


def _churn(summary: Summary) -> str:
    rows = [(*churn_cells(one), one.example) for one in summary.churn]
    return markup.table((*CHURN_COLUMNS, "for example"), rows, words=(0, len(CHURN_COLUMNS)))

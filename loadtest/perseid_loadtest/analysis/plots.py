"""The plots of the page, as plotly figures. Needs the extra `loadtest`; None where a run has nothing to show."""

import html
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from perseid_loadtest.analysis import series
from perseid_loadtest.analysis.rows import name_of
from perseid_loadtest.analysis.summary import Summary, measured
from perseid_loadtest.traffic.record import Run
from perseid_server.errors import InvalidRequest

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

BLUE, ORANGE, GREY, LINES = "#2f6db5", "#d9822b", "#8a94a0", "#e3e7ec"
MORE = (BLUE, ORANGE, "#4f9d69", "#b0527c", "#7a6fb0", GREY)
MOST_ADAPTERS = 30
MOST_POINTS = 1500

Named = Sequence[tuple[str, Run]]
"""Runs and what to call them."""


def check_plotly() -> None:
    """InvalidRequest where pages cannot be written: to be said before a run, not after it."""
    try:
        import plotly  # noqa: F401, PLC0415  needed for pages only
    except ImportError:
        raise InvalidRequest(
            "the page with plots needs plotly: pip install 'perseid[loadtest]', or leave --html out", field="html"
        ) from None


def latency_cdfs(runs: Named) -> "Figure | None":
    """The share of requests (of gaps, for ITL) within a latency, a line for each run."""
    kinds = {
        "TTFT": series.ttft_points,
        "ITL": series.itl_points,
        "TPOT": series.tpot_points,
        "end to end": series.e2e_points,
    }
    curves = {
        (kind, name): series.cumulative([value for _, value in points(run)])
        for kind, points in kinds.items()
        for name, run in runs
    }
    if not any(values for values, _ in curves.values()):
        return None
    figure = _subplots(2, 2, list(kinds), height=560)
    for place, kind in enumerate(kinds):
        row, column = place // 2 + 1, place % 2 + 1
        for colour, (name, _) in zip(MORE, runs, strict=False):
            values, shares = curves[kind, name]
            line = _line(name, values, shares, colour, shape="hv", legend=place == 0 and len(runs) > 1)
            figure.add_trace(line, row=row, col=column)
        figure.update_xaxes(title_text="s", rangemode="tozero", row=row, col=column)
        figure.update_yaxes(ticksuffix=" %", range=[0, 101], row=row, col=column)
    return figure


def latency_over_time(runs: Named) -> "Figure | None":
    """TTFT by the planned moment and ITL by the moment of the chunk: median and 99th percentile of each span, and the
    TTFT of single requests."""
    kinds = {"TTFT": series.ttft_points, "ITL": series.itl_points}
    if not any(points(run) for points in kinds.values() for _, run in runs):
        return None
    figure = _subplots(2, 1, list(kinds), height=520, shared_xaxes=True)
    for row, (kind, points_of) in enumerate(kinds.items(), start=1):
        for place, (name, run) in enumerate(runs):
            bins, points = series.Bins.of(measured(run)), points_of(run)
            if kind == "TTFT" and len(runs) == 1:
                figure.add_trace(_dots("requests", _thinned(points)), row=row, col=1)
            for q, width, dash in ((50, 2.0, "solid"), (99, 1.5, "dot")):
                colour = MORE[place] if len(runs) > 1 else {50: BLUE, 99: ORANGE}[q]
                label = f"{name} p{q}" if len(runs) > 1 else f"p{q}"
                line = _line(label, bins.middles, bins.percentiles(points, q), colour, width, dash, legend=row == 1)
                figure.add_trace(line, row=row, col=1)
        figure.update_yaxes(title_text="s", rangemode="tozero", row=row, col=1)
    figure.update_xaxes(title_text="seconds of the run", row=2, col=1)
    return figure


def throughput_over_time(runs: Named) -> "Figure | None":
    """Output tokens a second, and requests answered a second, beside those that were due."""
    if not any(measured(run) for _, run in runs):
        return None
    figure = _subplots(2, 1, ["output tokens/s", "requests/s"], height=520, shared_xaxes=True)
    for place, (name, run) in enumerate(runs):
        bins, colour = series.Bins.of(measured(run)), MORE[place]
        tokens = bins.sums(series.token_points(run))
        done = bins.sums([(record.ended, 1.0) for record in series.good_records(run)])
        many = len(runs) > 1
        figure.add_trace(_line(name, bins.middles, tokens, colour, legend=many), row=1, col=1)
        figure.add_trace(_line("answered", bins.middles, done, colour, legend=not many), row=2, col=1)
        if not many:
            due = bins.sums([(record.planned, 1.0) for record in measured(run)])
            figure.add_trace(_line("due", bins.middles, due, GREY, 1.5, "dot"), row=2, col=1)
    figure.update_yaxes(rangemode="tozero")
    figure.update_xaxes(title_text="seconds of the run", row=2, col=1)
    return figure


def by_adapter(summaries: Sequence[tuple[str, Summary]]) -> "Figure | None":
    """Median and 99th percentile (lighter) of TTFT, and requests, of the adapters most asked for."""
    names = list(dict.fromkeys(one.adapter for _, summary in summaries for one in summary.adapters))[:MOST_ADAPTERS]
    if not names:
        return None
    figure = _subplots(2, 1, ["TTFT, s", "requests"], height=520, shared_xaxes=True)
    labels = [_plain(name_of(name)) for name in names]
    many = len(summaries) > 1
    for place, (title, summary) in enumerate(summaries):
        found = {one.adapter: one for one in summary.adapters}
        own = [found.get(name) for name in names]
        colour = MORE[place]
        prefix = f"{title} " if many else ""
        p50, p99 = ([getattr(one, name, None) for one in own] for name in ("ttft_p50", "ttft_p99"))
        figure.add_trace(_bars(f"{prefix}p50", labels, p50, colour), row=1, col=1)
        figure.add_trace(_bars(f"{prefix}p99", labels, p99, colour, opacity=0.45), row=1, col=1)
        requests = [one.requests if one else None for one in own]
        figure.add_trace(_bars(f"{prefix}requests", labels, requests, GREY if not many else colour), row=2, col=1)
    figure.update_xaxes(type="category")
    return figure


def errors_over_time(run: Run) -> "Figure | None":
    """Failed requests a second by kind, when they ended."""
    kinds: Mapping[str, list[tuple[float, float]]] = defaultdict(list)
    for record in measured(run):
        if record.error is not None:
            kinds[record.error].append((record.ended, 1.0))
    if not kinds:
        return None
    bins = series.Bins.of(measured(run))
    figure = _subplots(1, 1, ["errors/s"], height=300)
    for place, (kind, points) in enumerate(sorted(kinds.items(), key=lambda item: -len(item[1]))):
        colour = MORE[place % len(MORE)]
        figure.add_trace(_bars(_plain(kind), bins.middles, bins.sums(points), colour))
    figure.update_layout(barmode="stack", bargap=0.05, showlegend=True)
    figure.update_xaxes(title_text="seconds of the run")
    return figure


def _subplots(rows: int, columns: int, titles: Sequence[str], height: int, **more: Any) -> "Figure":
    from plotly.subplots import make_subplots  # noqa: PLC0415  the extra `loadtest`

    between = 104 / height if rows > 1 else 0.0  # an axis with its title, and the next plot's
    figure = make_subplots(rows, columns, subplot_titles=titles, vertical_spacing=between, **more)
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 64, "r": 16, "t": 36, "b": 48},
        font={"family": "system-ui, sans-serif", "size": 12, "color": "#2b333b"},
        legend={"orientation": "h", "y": -0.16},
        hovermode="closest",
    )
    figure.update_annotations(font_size=13)
    figure.update_xaxes(gridcolor=LINES, zeroline=False, linecolor=LINES)
    figure.update_yaxes(gridcolor=LINES, zeroline=False, linecolor=LINES)
    return figure


def _line(
    name: str,
    x: Sequence[float],
    y: Sequence[float | None],
    colour: str,
    width: float = 2.0,
    dash: str = "solid",
    *,
    shape: str = "linear",
    legend: bool = True,
) -> dict[str, Any]:
    style = {"color": colour, "width": width, "dash": dash, "shape": shape}
    told = {"type": "scatter", "mode": "lines", "name": _plain(name), "line": style}
    return {**told, "x": list(x), "y": list(y), "showlegend": legend}


def _dots(name: str, points: series.Points) -> dict[str, Any]:
    told = {"type": "scatter", "mode": "markers", "name": name, "marker": {"size": 3, "color": GREY, "opacity": 0.5}}
    return {**told, "x": [moment for moment, _ in points], "y": [value for _, value in points]}


def _bars(
    name: str, x: Sequence[Any], y: Sequence[float | None], colour: str, *, opacity: float = 1.0
) -> dict[str, Any]:
    return {"type": "bar", "name": name, "x": list(x), "y": list(y), "marker": {"color": colour, "opacity": opacity}}


def _thinned(points: series.Points) -> series.Points:
    return points[:: -(-len(points) // MOST_POINTS)] if points else points


def _plain(text: str) -> str:
    """Plotly reads tags in labels."""
    return html.escape(text, quote=False)

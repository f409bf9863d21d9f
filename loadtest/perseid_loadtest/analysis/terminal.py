"""A run's figures in the terminal, readable at 80 columns."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from perseid_loadtest.analysis import formatting
from perseid_loadtest.analysis.rows import (
    ADAPTER_COLUMNS,
    CHURN_COLUMNS,
    LATENCY_COLUMNS,
    Row,
    adapter_cells,
    churn_cells,
    latency_cells,
    remarks,
    server_rows,
    throughput_rows,
)
from perseid_loadtest.analysis.summary import Summary

MOST_ADAPTERS = 20
"""Shown one by one; the rest is counted together."""


def print_summary(console: Console, summary: Summary) -> None:
    """Print everything that was measured; tables without a row are left out."""
    console.print(Text(formatting.printable(summary.target), style="bold"))
    if summary.goodput is not None:
        console.print(Text(f"good: {summary.goodput.slo.describe()}"))
    for table in _tables(summary):
        if table.row_count:
            console.print(table)
    for remark in remarks(summary):
        console.print(Text(remark, style="yellow"))


def new_table(title: str, columns: Sequence[str], *, words: Iterable[int] = (0,)) -> Table:
    """Columns of figures, right-aligned; those of `words` are text, and give way where it is narrow."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for place, column in enumerate(columns):
        if place in words:
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="right", no_wrap=True)
    return table


def add(table: Table, *cells: str) -> None:
    """A row, plain: what a server says may look like markup."""
    table.add_row(*(Text(cell) for cell in cells))


def _tables(summary: Summary) -> list[Table]:
    return [
        _latencies(summary),
        _figures("throughput", throughput_rows(summary)),
        _adapters(summary),
        _errors(summary),
        _churn(summary),
        _figures("by the server, during the run", server_rows(summary)),
    ]


def _latencies(summary: Summary) -> Table:
    table = new_table("latency, from the planned arrival", LATENCY_COLUMNS)
    for cells in latency_cells(summary):
        add(table, *cells)
    return table


def _figures(title: str, rows: Sequence[Row]) -> Table:
    """Two figures a line."""
    table = new_table(title, ["", "", "", ""], words=(0, 2))
    table.show_header = False
    for one, other in zip(rows[::2], [*rows[1::2], None], strict=False):
        add(table, one.label, one.text, *((other.label, other.text) if other is not None else ("", "")))
    return table


def _adapters(summary: Summary) -> Table:
    table = new_table("adapters", ADAPTER_COLUMNS)
    if len(summary.adapters) < 2 and not any(one.adapter for one in summary.adapters):
        return table  # only the base: said already
    shown, rest = summary.adapters[:MOST_ADAPTERS], summary.adapters[MOST_ADAPTERS:]
    for one in shown:
        add(table, *adapter_cells(one))
    if rest:
        sums = (sum(getattr(one, name) for one in rest) for name in ("requests", "errors", "output_tokens"))
        add(table, f"{len(rest)} more", *map(formatting.count, sums), *[formatting.NOTHING] * 3)
    return table


def _errors(summary: Summary) -> Table:
    table = new_table("errors", ["", "requests", "for example"], words=(0, 2))
    for error in summary.errors:
        add(
            table,
            formatting.printable(error.kind, 60),
            formatting.count(error.count),
            formatting.printable(error.example),
        )
    return table


def _churn(summary: Summary) -> Table:
    table = new_table("adapters changed meanwhile", CHURN_COLUMNS)
    for one in summary.churn:
        add(table, *churn_cells(one))
        if one.example:
            add(table, f"  for example: {formatting.printable(one.example)}", *[""] * 5)
    return table

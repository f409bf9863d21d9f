"""Two runs side by side: every figure of both, B ÷ A, and the options that differ."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from rich.console import Console
from rich.text import Text

from perseid_loadtest.analysis import formatting, markup, plots
from perseid_loadtest.analysis.files import Saved, write_whole
from perseid_loadtest.analysis.page import about, value_text
from perseid_loadtest.analysis.rows import Row, all_rows, remarks
from perseid_loadtest.analysis.terminal import add, new_table

STEADY = 0.02
"""A figure that changed by less is neither better nor worse."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One figure of both runs."""

    a: Row
    b: Row

    @property
    def ratio(self) -> float | None:
        """b ÷ a; None where one is missing or a is 0."""
        if self.a.value is None or self.b.value is None or not self.a.value:
            return None
        return self.b.value / self.a.value

    @property
    def text(self) -> str:
        """The ratio, and whether b's is the better figure; of what was nothing in a, anything is more."""
        more = self._is_more
        if more is None or not self.a.better:
            return formatting.ratio(self.ratio)
        return f"{formatting.ratio(self.ratio)} {'better' if more == (self.a.better == 'higher') else 'worse'}"

    @property
    def _is_more(self) -> bool | None:
        """Whether b is more than a; None where they are as good as alike."""
        ratio = self.ratio
        if ratio is not None:
            return None if abs(ratio - 1) < STEADY else ratio > 1
        return True if self.a.value == 0 and self.b.value else None


@dataclass(frozen=True, slots=True)
class Difference:
    """An option that the runs did not share, as it would be written; a dash where one has it not."""

    name: str
    a: str
    b: str


def pairs(a: Saved, b: Saved) -> list[Pair]:
    """All figures that at least one of them has."""
    of_a, of_b = ({row.label: row for row in all_rows(saved.summary)} for saved in (a, b))
    labels = [*of_a, *(label for label in of_b if label not in of_a)]
    found = [
        Pair(of_a.get(label) or _missing(of_b[label]), of_b.get(label) or _missing(of_a[label])) for label in labels
    ]
    return [pair for pair in found if pair.a.value is not None or pair.b.value is not None]


def differences(a: Saved, b: Saved) -> list[Difference]:
    """Options that differ, and limits: figures of such runs do not measure the same."""
    of_a, of_b = _options(a), _options(b)
    names = [*of_a, *(name for name in of_b if name not in of_a)]
    found = (Difference(name, of_a.get(name, formatting.NOTHING), of_b.get(name, formatting.NOTHING)) for name in names)
    return [one for one in found if one.a != one.b]


def print_comparison(console: Console, a: Saved, b: Saved) -> None:
    """Print both runs' figures with their ratios, and a warning where their options differ."""
    for name, saved in (("A", a), ("B", b)):
        console.print(Text(f"{name}: {formatting.printable(about(saved.run))}"))
        for remark in remarks(saved.summary):
            console.print(Text(f"   {remark}", style="yellow"))
    table = new_table("", ["", "A", "B", "B ÷ A"])
    for pair in pairs(a, b):
        add(table, pair.a.label, pair.a.text, pair.b.text, pair.text)
    console.print(table)
    differing = differences(a, b)
    if differing:
        console.print(Text("Their options differ, so they did not measure the same:", style="yellow"))
        table = new_table("", ["option", "A", "B"], words=(0, 1, 2))
        for one in differing:
            add(table, *map(formatting.printable, (one.name, one.a, one.b)))
        console.print(table)


def write_page(path: Path, a: Saved, b: Saved) -> None:
    """Both as one self-contained HTML page. InvalidRequest where plotly is missing or the file cannot be written."""
    plots.check_plotly()
    write_whole(path, markup.document(f"{a.run.target} and {b.run.target}", _body(a, b)))


def _body(a: Saved, b: Saved) -> Iterator[str]:
    runs, summaries = [("A", a.run), ("B", b.run)], [("A", a.summary), ("B", b.summary)]
    yield "<h1>Two load tests</h1>"
    for name, saved in (("A", a), ("B", b)):
        yield markup.note(f"{name}: {about(saved.run)}", "about")
        for remark in remarks(saved.summary):
            yield markup.note(f"{name}: {remark}", "remark")
    differing = differences(a, b)
    if differing:
        yield markup.note("Their options differ, so they did not measure the same.", "remark")
        rows = [(one.name, one.a, one.b) for one in differing]
        yield markup.section("Options that differ", markup.table(("option", "A", "B"), rows, words=(0, 1, 2)))
    figures = [(pair.a.label, pair.a.text, pair.b.text, pair.text) for pair in pairs(a, b)]
    yield markup.section("Figures", markup.table(("", "A", "B", "B ÷ A"), figures))
    yield markup.section("Latency", markup.plot(plots.latency_cdfs(runs), "cdf"))
    yield markup.section("Latency over time", markup.plot(plots.latency_over_time(runs), "latency"))
    yield markup.section("Throughput over time", markup.plot(plots.throughput_over_time(runs), "throughput"))
    yield markup.section("Adapters", markup.plot(plots.by_adapter(summaries), "adapters"))


def _missing(row: Row) -> Row:
    return replace(row, value=None)


def _options(saved: Saved) -> dict[str, str]:
    """As they come out of a file, whether they have been in one or not."""
    told = msgspec.json.decode(msgspec.json.encode(dict(saved.run.options), enc_hook=str))
    goodput = saved.summary.goodput
    return {name: value_text(value) for name, value in told.items()} | (
        {"limits": goodput.slo.describe()} if goodput is not None else {}
    )

"""Tables for the terminal and for a document, and the places in a document that a command writes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table


@dataclass(frozen=True)
class Sheet:
    """A table in words. The first column is text, the others are numbers."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def in_terminal(self) -> Table:
        """For rich."""
        table = Table(title=self.title, caption=self.note or None)
        for place, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if place else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def in_markdown(self) -> str:
        """For a document."""
        rule = ["---", *["--:"] * (len(self.headings) - 1)]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in (self.headings, rule, *self.rows))
        return "\n\n".join(part for part in (f"**{self.title}**", table, self.note) if part)


def replaced(text: str, name: str, content: str) -> str:
    """`text` with `content` between the marks of `name`, whatever was there. ValueError unless it has them once."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise ValueError(f"expected one {begin} and one {end} after it")
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n\n{content.strip()}\n\n{end}{after}"


def write_between(document: Path, name: str, content: str) -> None:
    """As `replaced`, in a file."""
    document.write_text(replaced(document.read_text(encoding="utf-8"), name, content), encoding="utf-8")

"""HTML pages of one file: style, script and figures inside, nothing fetched."""

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from perseid_loadtest.analysis.formatting import NOTHING, printable

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'; img-src data: blob:; "
    "font-src data:"
)
"""The browser itself refuses what would be fetched."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #2b333b; background: #fff; max-width: 1080px;
       margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 36px 0 8px; }
p.about, p.note { color: #5b6672; margin: 0 0 4px; overflow-wrap: anywhere; } p.note { font-size: 13px; }
p.remark { background: #fdf4e3; border-left: 3px solid #d9822b; margin: 12px 0; padding: 6px 12px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; max-width: 100%; }
th, td { text-align: right; padding: 3px 14px 3px 0; border-bottom: 1px solid #e3e7ec; vertical-align: top; }
th { font-weight: 600; color: #5b6672; } td.word, th.word { text-align: left; overflow-wrap: anywhere; }
td.better { color: #2e7d4f; } td.worse { color: #b3421e; }
div.scroll { overflow-x: auto; } div.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0; }
div.tile { border: 1px solid #e3e7ec; border-radius: 6px; padding: 8px 16px; min-width: 110px; }
div.tile b { display: block; font-size: 20px; font-weight: 600; } div.tile span { color: #5b6672; font-size: 13px; }
"""


def document(title: str, body: Iterable[str]) -> bytes:
    """The whole page, with plotly's script inside."""
    from plotly.offline import get_plotlyjs  # noqa: PLC0415  the extra `loadtest`

    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{plain(title)}</title>\n<style>{STYLE}</style>",
        f"<script>{get_plotlyjs()}</script>\n</head>\n<body>",
        *body,
        "</body>\n</html>\n",
    ]
    return "\n".join(parts).encode()


def section(title: str, *parts: str) -> str:
    """Parts below a heading."""
    return "\n".join([f"<section>\n<h2>{plain(title)}</h2>", *parts, "</section>"])


def plot(figure: "Figure | None", name: str) -> str:
    """A figure, or a line that says there is none."""
    from plotly.io import to_html  # noqa: PLC0415  the extra `loadtest`

    if figure is None:
        return note("Nothing to show.")
    config = {"displaylogo": False, "responsive": True}
    return str(to_html(figure, include_plotlyjs=False, full_html=False, div_id=f"plot-{name}", config=config))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[int] = (0,)) -> str:
    """Cells are text; those of `words` are left-aligned. A cell that ends in " better" or " worse" is coloured."""
    told = [tuple(row) for row in rows]
    if not told:
        return note("Nothing to show.")

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(_cell(tag, cell, place in words) for place, cell in enumerate(cells)) + "</tr>"

    head = [line("th", columns)] if any(columns) else []
    return "\n".join(['<div class="scroll"><table>', *head, *(line("td", row) for row in told), "</table></div>"])


def tiles(figures: Iterable[tuple[str, str]]) -> str:
    """(what, figure), large; what was not measured is left out."""
    told = (
        f'<div class="tile"><b>{plain(figure)}</b><span>{plain(what)}</span></div>'
        for what, figure in figures
        if figure != NOTHING
    )
    return '<div class="tiles">' + "".join(told) + "</div>"


def note(text: str, kind: str = "note") -> str:
    """A line of text."""
    return f'<p class="{kind}">{plain(text)}</p>'


def plain(text: str) -> str:
    """Text, whatever a server or a name holds."""
    return html.escape(printable(text, 2000))


def _cell(tag: str, text: str, word: bool) -> str:
    kinds = ["word"] if word else [kind for kind in ("better", "worse") if text.endswith(f" {kind}")]
    kind = f' class="{kinds[0]}"' if kinds else ""
    return f"<{tag}{kind}>{plain(text)}</{tag}>"

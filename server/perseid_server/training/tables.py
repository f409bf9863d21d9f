"""Tables and shares of a report, in Markdown."""

from collections.abc import Sequence


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines; the first column is text, the others numbers."""
    lines = [heads, ["---", *("---:" for _ in heads[1:])], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def percent(share: float | None, digits: int = 0) -> str:
    """Empty where there is no share."""
    return "" if share is None else f"{100 * share:.{digits}f} %"

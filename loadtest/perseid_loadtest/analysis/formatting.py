"""Figures as people read them. What was not measured is a dash; NaN is never shown."""

import math

NOTHING = "–"


def seconds(value: float | None) -> str:
    """Three digits, in ms below a second."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{_digits(value)} s" if abs(value) >= 0.9995 else f"{_digits(1000 * value)} ms"


def number(value: float | None) -> str:
    """Three digits; whole above a hundred."""
    return NOTHING if value is None or not math.isfinite(value) else _digits(value)


def count(value: float | None) -> str:
    """A whole number."""
    return NOTHING if value is None or not math.isfinite(value) else f"{value:,.0f}"


def percent(share: float | None) -> str:
    """A share of 1. Only all is 100 %, and only nothing is 0 %."""
    if share is None or not math.isfinite(share):
        return NOTHING
    if 0.9995 <= share < 1:
        return "> 99.9 %"
    return "< 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def ratio(value: float | None) -> str:
    """How many times as much."""
    return NOTHING if value is None or not math.isfinite(value) else f"{value:.2f}"


def printable(text: str, limit: int = 300) -> str:
    """What a server said, safe on a terminal: one line, no control characters, shortened."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _digits(value: float) -> str:
    size = abs(value)
    if size == 0.0:
        return "0"
    if size >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 9.995 else f"{value:.2f}" if size >= 0.09995 else f"{value:.2g}"

"""Sections of a benchmark, each with a time budget of its own, within the budget of the whole."""

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, TypeVar

T = TypeVar("T")
Row = dict[str, Any]


class CheckFailed(Exception):
    """A kernel computed something wrong: no measurement after it means anything."""


@dataclass(slots=True)
class Deadline:
    """Until when a section may begin another point."""

    at: float
    clock: Callable[[], float] = monotonic

    def passed(self) -> bool:
        """No further point may begin."""
        return self.clock() >= self.at


@dataclass(frozen=True, slots=True)
class Section:
    """`run` adds a row for each point and asks the deadline before each; it says in `notes` what it left out."""

    name: str
    seconds: float
    run: "Callable[[Report, Deadline], None]"


@dataclass(slots=True)
class Report:
    """One section's result."""

    name: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    failed: bool = False


def points(report: Report, deadline: Deadline, wanted: Sequence[T]) -> Iterator[T]:
    """Iterate over `wanted` until the time is over; what is left is noted."""
    for index, point in enumerate(wanted):
        if deadline.passed():
            report.notes.append(f"out of time: {len(wanted) - index} of {len(wanted)} points skipped")
            return
        yield point


def run_sections(
    sections: Sequence[Section],
    total_seconds: float,
    on_report: Callable[[list[Report]], None],
    clock: Callable[[], float] = monotonic,
) -> list[Report]:
    """Run them in order. One that fails is reported and the next begins, but after a CheckFailed all others are
    skipped: they would measure wrong kernels. `on_report` is called after each, so a stopped run keeps its results.
    """
    end = clock() + total_seconds
    reports: list[Report] = []
    wrong = False
    for section in sections:
        report = Report(section.name)
        reports.append(report)
        begun = clock()
        if wrong:
            report.notes.append("skipped: a check failed before")
        elif begun >= end:
            report.notes.append("skipped: no time was left")
        else:
            try:
                section.run(report, Deadline(min(begun + section.seconds, end), clock))
            except CheckFailed as error:
                wrong = report.failed = True
                report.notes.append(f"wrong result: {error}")
            except Exception as error:  # noqa: BLE001  (one broken section must not cost the others' results)
                report.failed = True
                report.notes.append(f"failed: {type(error).__name__}: {error}")
                report.notes.append(traceback.format_exc(limit=-4))
        report.seconds = clock() - begun
        on_report(reports)
    return reports

"""Time budgets, and what happens to the other sections when one fails. On a clock of the test's own."""

import json
from pathlib import Path

import torch

from perseid_kernels.bench.report import lines_of, machine, table, write_json
from perseid_kernels.bench.sections import CheckFailed, Deadline, Report, Section, points, run_sections


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def work(clock: Clock, count: int, each: float):
    """A section's function of `count` points that take `each` seconds."""

    def run(report: Report, deadline: Deadline) -> None:
        for point in points(report, deadline, list(range(count))):
            clock.now += each
            report.rows.append({"point": point})

    return run


def names_and_rows(reports: list[Report]) -> dict[str, int]:
    return {report.name: len(report.rows) for report in reports}


def test_a_section_begins_no_point_beyond_its_budget() -> None:
    clock = Clock()
    sections = [Section("a", 10, work(clock, 5, each=4)), Section("b", 10, work(clock, 2, each=4))]
    reports = run_sections(sections, 1000, lambda reports: None, clock)
    assert names_and_rows(reports) == {"a": 3, "b": 2}  # the third point of a begins at 8 s
    assert reports[0].notes == ["out of time: 2 of 5 points skipped"]
    assert reports[1].notes == []
    assert [report.seconds for report in reports] == [12, 8]


def test_the_whole_has_a_budget_too() -> None:
    clock = Clock()
    sections = [Section(name, 10, work(clock, 3, each=4)) for name in "abc"]
    reports = run_sections(sections, 15, lambda reports: None, clock)
    assert names_and_rows(reports) == {"a": 3, "b": 1, "c": 0}
    assert reports[1].notes == ["out of time: 2 of 3 points skipped"]
    assert reports[2].notes == ["skipped: no time was left"]


def fails(error: Exception):
    def run(report: Report, deadline: Deadline) -> None:
        report.rows.append({"point": 0})
        raise error

    return run


def test_a_section_that_fails_costs_no_other() -> None:
    clock = Clock()
    sections = [Section("broken", 9, fails(RuntimeError("no memory"))), Section("next", 9, work(clock, 2, 1))]
    reports = run_sections(sections, 100, lambda reports: None, clock)
    assert names_and_rows(reports) == {"broken": 1, "next": 2}
    assert reports[0].failed
    assert reports[0].notes[0] == "failed: RuntimeError: no memory"


def test_nothing_is_measured_after_a_wrong_result() -> None:
    clock = Clock()
    sections = [Section("checks", 9, fails(CheckFailed("q4: error 1"))), Section("next", 9, work(clock, 2, 1))]
    reports = run_sections(sections, 100, lambda reports: None, clock)
    assert names_and_rows(reports) == {"checks": 1, "next": 0}
    assert [report.notes for report in reports] == [["wrong result: q4: error 1"], ["skipped: a check failed before"]]


def test_results_are_written_after_each_section(tmp_path: Path) -> None:
    clock, seen = Clock(), []

    def on_report(reports: list[Report]) -> None:
        write_json(tmp_path / "out.json", {"device": "none"}, reports)
        seen.append(len(json.loads((tmp_path / "out.json").read_text())["sections"]))

    run_sections([Section(name, 10, work(clock, 1, 1)) for name in "ab"], 99, on_report, clock)
    assert seen == [1, 2]
    assert json.loads((tmp_path / "out.json").read_text())["machine"] == {"device": "none"}
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_a_table_has_a_column_for_every_key() -> None:
    assert table([{"rows": 1, "µs": 12.3456}, {"rows": 64, "vLLM µs": "not installed", "ok": True}]) == [
        "rows     µs        vLLM µs   ok",
        "   1  12.35              –    –",
        "  64      –  not installed  yes",
    ]
    assert table([]) == []
    assert lines_of(Report("a", [{"x": 1}], ["late"], 2.0)) == ["== a (2 s)", "x", "1", "note: late", ""]


def test_the_machine_is_named() -> None:
    facts = machine(torch.device("cpu"))
    assert facts["device"] == "cpu"
    assert facts["processor"]

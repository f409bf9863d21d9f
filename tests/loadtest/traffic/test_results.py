"""What a run brought is written and shown wherever it is wanted, whatever fails beside it."""

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from perseid_loadtest.analysis import compare, files, page, terminal
from perseid_loadtest.analysis.summary import summarise
from perseid_loadtest.traffic.own_cost import fake_server
from perseid_server.errors import InvalidRequest
from tests.loadtest.analysis.runs import answer, run_of
from tests.server.cli.running import Perseid


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with fake_server(0.0) as address:
        yield address


@pytest.fixture
def short(url: str, tmp_path: Path) -> tuple[str, ...]:
    """A run of few requests, with both files."""
    told = ("--target", url, "--requests", "5", "--warm-up", "0", "--output-tokens", "2")
    return (*told, "--json", str(tmp_path / "run.json"), "--html", str(tmp_path / "run.html"))


def fail(*_: object) -> None:
    raise InvalidRequest("no space")


def records(folder: Path) -> int:
    return len(json.loads((folder / "run.json").read_text())["run"]["records"])


@contextmanager
def nobody_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The output as it is behind `| head` once it has left."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as out, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", out)
        yield


@pytest.mark.parametrize("failing", ["json", "html"])
def test_a_file_that_fails_takes_nothing_from_the_others(perseid: Perseid, short, failing, tmp_path, monkeypatch):
    monkeypatch.setattr(*{"json": (files, "write", fail), "html": (page, "write_page", fail)}[failing])
    done = perseid("loadtest", *short)
    assert (done.status, done.err) == (1, "perseid: no space\n")
    assert "TTFT" in done.out
    other = {"json": "run.html", "html": "run.json"}[failing]
    assert [path.name for path in tmp_path.iterdir()] == [other]
    assert [line for line in done.out.splitlines() if line.startswith("written")] == [f"written: {tmp_path / other}"]


def test_files_are_written_where_nobody_reads_the_terminal(perseid: Perseid, short, tmp_path, monkeypatch):
    with nobody_reads(monkeypatch):
        assert perseid("loadtest", *short).status == 1
    assert records(tmp_path) == 5
    assert (tmp_path / "run.html").stat().st_size > 0


def test_a_sweep_goes_on_where_nobody_reads_the_terminal(perseid: Perseid, short, tmp_path, monkeypatch):
    with nobody_reads(monkeypatch):
        assert perseid("loadtest", *short, "--sweep", "--rate", "6400", "--slo", "e2e=1us").status == 1
    assert len(json.loads((tmp_path / "run.json").read_text())["run"]["options"]["sweep"]) == 7


def test_a_terminal_without_the_letters_shows_the_rest(perseid: Perseid, short, tmp_path, monkeypatch):
    out = io.TextIOWrapper(shown := io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert perseid("loadtest", *short, "--slo", "ttft=1s").status == 0
    out.flush()
    assert b"good: TTFT ? 1.00 s" in shown.getvalue()
    assert records(tmp_path) == 5


def test_an_output_that_is_full_is_one_line(perseid: Perseid, short, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(terminal, "print_summary", full)
    done = perseid("loadtest", *short)
    assert (done.status, done.err) == (1, "perseid: the output cannot be written: No space left on device\n")
    assert records(tmp_path) == 5


def test_a_comparison_is_shown_and_written_whichever_fails(perseid: Perseid, tmp_path, monkeypatch):
    run, path, html = run_of(answer()), tmp_path / "run.json", tmp_path / "page.html"
    files.write(path, run, summarise(run))
    arguments = ("loadtest", "--compare", str(path), str(path), "--html", str(html))
    with monkeypatch.context() as patched:
        patched.setattr(compare, "write_page", fail)
        done = perseid(*arguments)
    assert (done.status, done.err) == (1, "perseid: no space\n")
    assert "TTFT mean" in done.out
    monkeypatch.setattr(compare, "print_comparison", fail)
    assert perseid(*arguments).status == 1
    assert html.exists()


def test_a_place_is_tried_before_the_run_and_no_file_is_left(perseid: Perseid, tmp_path: Path):
    done = perseid("loadtest", "--target", "http://127.0.0.1:1", "--json", str(tmp_path / "deep" / "run.json"))
    assert "is a server running there?" in done.err
    assert [path.name for path in tmp_path.rglob("*")] == ["deep"]

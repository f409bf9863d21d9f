"""Terminal, page and comparison: their figures, whatever a run or a server holds."""

import io
import json
import re
import sys
from html.parser import HTMLParser

import pytest
from rich.console import Console

from perseid_loadtest.analysis import compare, files, page, rows, terminal
from perseid_loadtest.analysis.rows import Row
from perseid_loadtest.analysis.slo import Slo
from perseid_loadtest.analysis.summary import summarise
from perseid_loadtest.traffic.record import ChurnRecord
from perseid_server.errors import InvalidRequest
from tests.loadtest.analysis.runs import RUNS, answer, failure, run_of

HOSTILE = "</script><script>alert(1)</script>[bold]\x1b[31m"
PLOTS = {"plot-cdf", "plot-latency", "plot-throughput", "plot-adapters"}


class Page(HTMLParser):
    """Tags with their attributes, cells by row, and the text outside of scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.text, self.scripts = [], [], "", []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data + "\n"
            if self._inside in ("td", "th"):
                self.rows[-1][-1] += data

    @property
    def plots(self):
        return {attrs["id"] for tag, attrs in self.tags if tag == "div" and attrs.get("id", "").startswith("plot-")}


def saved(run):
    return files.Saved(run, summarise(run, Slo(ttft_s=0.8)))


def printed(show, *given, width=80):
    out = io.StringIO()
    show(Console(file=out, width=width), *given)
    return out.getvalue()


def written(tmp_path, *given):
    path = tmp_path / "page.html"
    (page if len(given) == 1 else compare).write_page(path, *given)
    return Page(path.read_text())


@pytest.fixture
def full():
    return run_of(
        answer(0, 0.0, adapter="a"),
        answer(1, 2.0, ((2.5, 2), (2.9, 3)), adapter="b"),
        failure(2, adapter="c"),
        churn=(ChurnRecord("load", "x", 1.0, 1.5),),
        client_busy=0.95,
        server_before={"perseid_num_preemptions_total": 1.0},
        server_after={"perseid_num_preemptions_total": 5.0},
    )


@pytest.fixture
def hostile():
    return run_of(
        answer(adapter=HOSTILE),
        failure(1, error=HOSTILE, message=HOSTILE, adapter="b" * 500),
        options={HOSTILE: HOSTILE},
        stopped_early=HOSTILE,
    )


def test_the_terminal_shows_every_table(full):
    out = printed(terminal.print_summary, saved(full).summary)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "good: TTFT ≤ 800 ms" in lines
    assert "TTFT 750 ms 750 ms 950 ms 995 ms 1.00 s" in lines
    assert "end to end 1.10 s 1.10 s 1.26 s 1.30 s 1.30 s" in lines
    assert "a 1 0 3 1.00 s 1.00 s 433 ms" in lines
    assert "429 1 queue full" in lines
    assert "load 1 0 500 ms 500 ms 500 ms" in lines
    assert "preemptions 4" in lines
    assert "Never answered, and unknown to the fairness index: c." in lines
    assert any("may be the bottleneck" in line for line in lines)


@pytest.mark.parametrize("name", RUNS)
def test_the_terminal_survives_every_run_within_80_columns(name):
    out = printed(terminal.print_summary, saved(RUNS[name]).summary)
    assert "nan" not in out.lower()
    assert max(map(len, out.splitlines())) <= 80


def test_names_and_messages_are_plain_text_in_the_terminal(hostile):
    out = printed(terminal.print_summary, saved(hostile).summary)
    assert "\x1b" not in out
    assert "[bold]" in out
    assert out.count("b") > 119  # a long name is folded, not cut off
    assert max(map(len, out.splitlines())) <= 80


def test_many_adapters_are_summed_up():
    records = [answer(number, adapter=f"adapter-{number:02}") for number in range(25)]
    out = printed(terminal.print_summary, saved(run_of(*records)).summary)
    assert "adapter-19" in out
    assert "adapter-20" not in out
    assert re.search(r"5 more +5 +0 +15 ", out)


def test_the_page_has_figures_plots_and_options(full, tmp_path):
    found = written(tmp_path, saved(full))
    assert found.plots == PLOTS | {"plot-errors"}
    assert ["TTFT", "750 ms", "750 ms", "950 ms", "995 ms", "1.00 s"] in found.rows
    assert ["429", "1", "queue full"] in found.rows
    assert ["goodput, share", "33.3 %"] in found.rows
    assert ["rate", "2.0"] in found.rows
    assert ["preemptions", "4"] in found.rows
    assert "2023-11-14 22:13:20 UTC" in found.text


def test_the_plots_hold_the_values(full, tmp_path):
    [script] = [one for one in written(tmp_path, saved(full)).scripts if '"plot-cdf"' in one[:2000]]
    begin = script.index("[", script.index('"plot-cdf"'))
    traces, _ = json.JSONDecoder().raw_decode(script[begin:])
    assert traces[0]["x"] == [0.5, 1.0]
    assert traces[0]["y"] == [50.0, 100.0]
    assert len(traces) == 4


def test_the_page_fetches_nothing(full, tmp_path):
    found = written(tmp_path, saved(full))
    assert not [tag for tag, _ in found.tags if tag in ("link", "img", "iframe", "object", "base")]
    assert not [attrs for _, attrs in found.tags if attrs.keys() & {"src", "href"}]
    assert any("default-src 'none'" in attrs.get("content", "") for tag, attrs in found.tags if tag == "meta")
    assert any("plotly.js v" in script[:500] for script in found.scripts)


@pytest.mark.parametrize("name", RUNS)
def test_the_page_survives_every_run(name, tmp_path):
    found = written(tmp_path, saved(RUNS[name]))
    assert "nan" not in found.text.lower()
    assert ["requests", str(saved(RUNS[name]).summary.requests)] in found.rows


def test_a_page_of_nothing_says_so(tmp_path):
    found = written(tmp_path, saved(RUNS["no records"]))
    assert found.plots == set()
    assert "No request was measured." in found.text


def test_nothing_in_a_run_becomes_markup(hostile, tmp_path):
    for given in ([saved(hostile)], [saved(hostile), saved(RUNS["one token"])]):
        found = written(tmp_path, *given)
        assert not [script for script in found.scripts if script == "alert(1)"]
        assert "</script><script>alert(1)</script>[bold] [31m" in found.text
        assert "\x1b" not in found.text


def test_without_plotly_the_extra_is_named(full, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    for write in (page.write_page, lambda path, one: compare.write_page(path, one, one)):
        with pytest.raises(InvalidRequest, match=r"pip install 'perseid\[loadtest\]'"):
            write(tmp_path / "page.html", saved(full))
    assert not list(tmp_path.iterdir())


def test_a_comparison_has_ratios_and_says_which_is_better(full):
    slower = run_of(answer(0, -1.0, adapter="a"), answer(1, 2.0, adapter="b", chunks=((3.0, 1), (3.1, 4))))
    out = printed(compare.print_comparison, saved(full), saved(slower))
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "TTFT mean 750 ms 1.50 s 2.00 worse" in lines
    assert "failed 1 0 0.00 better" in lines
    assert "output tokens/s 0.80 0.80 1.00" in lines
    assert "preemptions, server 4 – –" in lines
    assert not any("options differ" in line for line in lines)


@pytest.mark.parametrize(
    ("a", "b", "better", "text"),
    [
        (0, 50, "lower", "– worse"),
        (0, 50, "higher", "– better"),
        (0, 50, "", "–"),
        (0, 0, "lower", "–"),
        (0, None, "lower", "–"),
        (None, 1, "lower", "–"),
        (50, 0, "lower", "0.00 better"),
        (50, 50.5, "lower", "1.01"),
    ],
)
def test_a_figure_that_was_nothing_before_has_a_verdict(a, b, better, text):
    """50 failed requests after none have no ratio and are worse all the same."""
    assert compare.Pair(*(Row("failed", value, str, better) for value in (a, b))).text == text


def test_what_could_not_be_put_back_is_told(tmp_path):
    left = (ChurnRecord("unload", "[x]", 9.0, 9.1, "409: in use\x1b"), ChurnRecord("replace", "y", 9.1, 9.2, "503: "))
    one = saved(run_of(answer(), not_put_back=left))
    told = "Still changed on the server, since this failed: unload [x] (409: in use), replace y (503:)."
    assert told in " ".join(printed(terminal.print_summary, one.summary).split())
    assert told in written(tmp_path, one).text


def test_options_that_differ_are_warned_of(tmp_path):
    a = saved(run_of(options={"rate": 2.0, "adapters": ("a",), "seed": 1}))
    b = saved(run_of(options={"rate": 4.0, "adapters": ["a"], "requests": 5}))
    assert compare.differences(a, b) == [
        compare.Difference("rate", "2.0", "4.0"),
        compare.Difference("seed", "1", "–"),
        compare.Difference("requests", "–", "5"),
    ]
    assert "Their options differ" in printed(compare.print_comparison, a, b)
    found = written(tmp_path, a, b)
    assert ["rate", "2.0", "4.0"] in found.rows
    assert "Their options differ" in found.text


def test_other_limits_are_another_goodput(full):
    other = files.Saved(full, summarise(full, Slo(ttft_s=9.0)))
    assert [one.name for one in compare.differences(saved(full), other)] == ["limits"]


@pytest.mark.parametrize("name", RUNS)
def test_comparisons_survive_every_run(name, full, tmp_path):
    for a, b in ((saved(full), saved(RUNS[name])), (saved(RUNS[name]), saved(full))):
        out = printed(compare.print_comparison, a, b)
        assert "nan" not in out.lower()
        assert max(map(len, out.splitlines())) <= 80
    found = written(tmp_path, saved(full), saved(RUNS[name]))
    assert found.plots >= PLOTS
    assert "nan" not in found.text.lower()


def test_answers_that_end_where_the_server_ends_them_are_told():
    told = "their lengths are not as planned."
    assert told in rows.remarks(summarise(run_of(answer(), stops_at_eos=True)))[0]
    assert rows.remarks(summarise(run_of(answer()))) == []

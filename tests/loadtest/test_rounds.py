"""Rounds on engines whose rates are known, and what is made of them."""

import io
import json

import pytest
from rich.console import Console

from perseid_loadtest import report
from perseid_loadtest.rounds import Summary, measure, ratio, rotated
from perseid_loadtest.workload import KINDS, Case, Workload, cases

BASE = Case("base", 16)
MIXED = Case("mixed", 16)


class Fake:
    """Rate: `speed` in round 1, a tenth more in each later one; keeps what it was asked."""

    def __init__(self, name, speed, kinds=KINDS, log=None):
        self.name, self.speed, self.kinds = name, speed, kinds
        self.log = log if log is not None else []

    def can(self, case):
        return case.kind in self.kinds

    def rate(self, case, turn):
        self.log.append((turn, case, self.name))
        return self.speed * (1 + (turn - 1) / 10)


def test_the_first_round_is_not_counted():
    rates = measure([Fake("a", 100)], [BASE], 3, lambda _: None)
    assert rates == {("a", BASE): pytest.approx([100, 110, 120])}


def test_engines_follow_each_other_case_by_case_and_take_turns_at_being_first():
    log = []
    engines = [Fake("a", 1, log=log), Fake("b", 1, log=log), Fake("c", 1, kinds=("base",), log=log)]
    measure(engines, [BASE, MIXED], 2, lambda _: None)
    order = [
        "".join(name for turn, case, name in log if (turn, case) == (t, c)) for t in range(3) for c in (BASE, MIXED)
    ]
    assert order == ["abc", "ab", "bca", "ba", "cab", "ab"]


def test_rotation_comes_back():
    assert rotated("abc", 3) == list("abc")


def test_ratios_are_taken_round_by_round():
    """The medians' ratio would be 1.5 here."""
    rates = {("a", BASE): [10.0, 40.0, 30.0], ("b", BASE): [5.0, 20.0, 60.0]}
    assert ratio(rates, ("a", BASE), ("b", BASE)) == Summary(2.0, 0.75)


def test_no_ratio_to_what_was_not_measured():
    assert ratio({("a", BASE): [1.0]}, ("a", BASE), ("b", BASE)) is None


def test_spread_is_relative_to_the_median():
    assert Summary.of([90.0, 100.0, 130.0]) == Summary(100.0, 0.4)


@pytest.fixture
def rates():
    return {
        ("perseid", BASE): [200.0, 220.0],
        ("perseid", MIXED): [160.0, 176.0],
        ("llama", BASE): [100.0, 110.0],
        ("perseid over gRPC", BASE): [220.0, 242.0],
        ("engine alone", BASE): [250.0, 275.0],
        ("perseid without adapters", BASE): [200.0, 220.0],
    }


def test_our_own_comparisons(rates):
    found = {one.what: one.value.median for one in report.comparisons(rates)}
    assert found == {
        "step seen over SSE ÷ engine's own, base": pytest.approx(1.25),
        "step seen over gRPC ÷ engine's own, base": pytest.approx(250 / 220),
        "base, with ÷ without adapters loaded": pytest.approx(1.0),
        "mixed ÷ base": pytest.approx(0.8),
    }


def test_the_table_shows_rates_and_ratios(rates):
    out = io.StringIO()
    report.show(rates, {"peak_memory_mib": 900.0}, Console(file=out, width=160))
    lines = out.getvalue().splitlines()
    [base] = [line for line in lines if "210 (10 %)" in line]
    assert "105 (10 %)" in base
    assert "2.00" in base
    [mixed] = [line for line in lines if "168 (10 %)" in line]
    assert mixed.count("–") == 2
    assert "peak_memory_mib: 900.0" in lines


def test_figures_hold_every_round(rates, tmp_path):
    path = report.write(tmp_path / "new", report.figures(rates, {"time_to_ready_s": 3.0}, {"prompt": 64}))
    content = json.loads(path.read_text())
    assert content["time_to_ready_s"] == 3.0
    [llama] = [row for row in content["rates"] if row["engine"] == "llama"]
    assert llama["rounds"] == [100.0, 110.0]
    assert [(row["engine"], row["kind"], row["median"]) for row in content["ratios"]] == [("llama", "base", 2.0)]
    assert len(content["own"]) == 4


def test_the_plot_is_a_png_or_left_out(rates, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    path = report.plot(tmp_path, rates)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_no_plot(rates, tmp_path, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(report.importlib, "import_module", missing)
    assert report.plot(tmp_path, rates) is None


def test_prompts_are_the_same_for_every_engine_and_new_in_every_round():
    workload = Workload(8, 4, ("a", "b", "c"))
    assert workload.jobs(MIXED, 1) == workload.jobs(MIXED, 1)
    prompts = [job.prompt for turn in range(3) for case in (BASE, MIXED) for job in workload.jobs(case, turn)]
    assert len(set(prompts)) == len(prompts) == 3 * 2 * 16


@pytest.mark.parametrize(("kind", "names"), [("base", "...."), ("one", "aaaa"), ("mixed", "abca")])
def test_which_row_names_which_adapter(kind, names):
    jobs = Workload(8, 4, ("a", "b", "c")).jobs(Case(kind, 4), 0)
    assert "".join(job.adapter or "." for job in jobs) == names


def test_prefill_is_one_long_prompt_and_one_token():
    [job] = Workload(8, 4, ("a",)).jobs(Case("one", 1, "prefill"), 0)
    assert (len(job.prompt), job.tokens, job.adapter) == (512, 1, "a")


def test_without_adapters_only_the_base_is_measured():
    assert {case.kind for case in cases([1, 4], adapters=False)} == {"base"}
    assert len(cases([1, 4, 16], adapters=True)) == 3 * 3 + 2

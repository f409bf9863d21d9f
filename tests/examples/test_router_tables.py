"""The tables of the two router commands, on numbers made up here."""

import json
from dataclasses import asdict

from gate_trial import Accuracy, Trial
from router_scale import ROUTED, Scale, StepCost, budget_for, costs_from, sheet
from router_scores import AUTO, BASE, EXPLICIT, GATES, UNIFORM, CompositeScore, OutsideScore, Results, TaskScore
from router_tables import sheets

from perseid_loadtest.rounds import Summary
from perseid_loadtest.routed_step import Cost

RESULTS = Results(
    seconds=600,
    items=100,
    prompts=40,
    tasks=[
        TaskScore("iso-date", BASE.name, 0),
        TaskScore("iso-date", EXPLICIT, 100),
        TaskScore("iso-date", AUTO.name, 98, 90, 99),
        TaskScore("iso-date", GATES.name, 96, 0, 80),
        TaskScore("staff-sql", BASE.name, 2),
        TaskScore("staff-sql", EXPLICIT, 80),
        TaskScore("staff-sql", AUTO.name, 82, 70, 97),
        TaskScore("staff-sql", GATES.name, 75, 0, 60),
    ],
    composites=[
        CompositeScore(3, BASE.name, 1, 0),
        CompositeScore(3, AUTO.name, 60, 20),
        CompositeScore(3, GATES.name, 61, 21),
        CompositeScore(3, UNIFORM, 2, 0),
        CompositeScore(3, "iso-date", 24, 1),
        CompositeScore(3, "staff-sql", 20, 0),
    ],
    outside=[OutsideScore(AUTO.name, 95, 97, 98, 40, 40)],
)


def test_tasks_have_a_row_each_and_a_mean():
    tasks, _, _ = sheets(RESULTS)
    assert tasks.headings == ["task", "base", "adapter by name", "auto", "gates only"]
    assert tasks.rows[0] == ["iso-date", "0", "100", "98", "96"]
    assert tasks.rows[-1] == ["mean", "1.0", "90.0", "90.0", "85.5"]
    assert "auto reaches 100.0 %, the gates alone 95.0 %" in tasks.note
    assert "answered 80 % of auto's requests" in tasks.note
    assert "had 70 % of the weight" in tasks.note


def test_composites_stand_beside_the_best_single_adapter():
    _, composites, _ = sheets(RESULTS)
    assert composites.rows == [["3", "1 (0)", "60 (20)", "61 (21)", "2 (0)", "24 (1) iso-date", "2.5 ×"]]


def test_outside():
    _, _, outside = sheets(RESULTS)
    assert outside.rows == [["auto", "95", "97", "98", "40"]]


def test_scale_has_a_row_for_each_n():
    trial = Trial(28, 80, 80, 99.0, Accuracy(50, 60), Accuracy(70, 80), 75, 90, 1.5, 3.0)
    costs = (StepCost("explicit", 20, 1), StepCost(ROUTED, 25, 1.25))
    table = sheet([Scale(8, trial, costs), Scale(8, trial)])
    shares = ["28", "8 + 20", "50.0", "70.0", "80.0", "75.0", "90.0", "1.5"]
    assert table.rows == [[*shares, "25.0", "1.25"], [*shares, "–", "–"]]
    assert len(table.headings) == len(table.rows[0])


def test_many_adapters_get_fewer_samples_each():
    budgets = [budget_for(n) for n in (4, 8, 28, 64)]
    assert len({budget.steps for budget in budgets}) == 1
    assert [budget.per_step for budget in budgets] == [2, 2, 1, 1]
    assert [budget.held_out for budget in budgets] == [24, 24, 14, 6]


def test_step_costs_come_from_what_the_benchmark_wrote(tmp_path):
    costs = [
        Cost(n, kind, Summary(ms, 0.1), Summary(ms / 20, 0.1))
        for n in (4, 8)
        for kind, ms in (("base", n), (ROUTED, 25))
    ]
    file = tmp_path / "costs.json"
    file.write_text(json.dumps({"rows": 16, "costs": [asdict(cost) for cost in costs]}))
    assert costs_from(file, 8) == (StepCost("base", 8, 0.4), StepCost(ROUTED, 25, 1.25))

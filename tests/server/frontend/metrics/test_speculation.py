"""What drafting brings, by what adapts the base."""

import pytest

from perseid_server.engine.messages import BLENDED, ROUTED, EngineStats, SpeculationStats, StepOutputs
from perseid_server.frontend.metrics import MAX_ADAPTER_LABELS, Metrics
from tests.fakes import fake_ready
from tests.server.frontend.metrics.test_metrics import complaints, samples

COUNTERS = ("num_steps_total", "num_tokens_total", "num_draft_tokens_total", "num_accepted_tokens_total")


def step(metrics: Metrics, *told: SpeculationStats, budget: int = 0, **names: str) -> None:
    metrics.engine_stepped(StepOutputs(stats=EngineStats(speculation=told, draft_budget=budget)), names)


def counts(metrics: Metrics, label: str) -> list[float]:
    told = samples(metrics)
    return [told[f'spec_decode_{name}{{adapter="{label}"}}'] for name in (*COUNTERS, "saved_seconds")]


def test_counters_follow_the_engines_by_name_and_kind() -> None:
    metrics = Metrics(8)
    step(metrics, SpeculationStats("", 1, 2, 3, 1, 0.5), SpeculationStats("v", 4, 4, 0, 0), v="one")
    step(
        metrics,
        SpeculationStats("", 3, 7, 11, 4, 0.75),
        SpeculationStats("v", 4, 4, 0, 0),
        SpeculationStats(BLENDED, 1, 1),
        SpeculationStats(ROUTED, 2, 5, 6, 3),
        budget=5,
        v="one",
    )
    assert counts(metrics, "base") == [3, 7, 11, 4, 0.75]
    assert counts(metrics, "one") == [4, 4, 0, 0, 0]
    assert counts(metrics, "blend") == [1, 1, 0, 0, 0]
    assert counts(metrics, "auto") == [2, 5, 6, 3, 0]
    assert samples(metrics)["spec_decode_budget_rows"] == 5


def test_counters_go_on_across_a_restart_and_the_budget_does_not() -> None:
    metrics = Metrics(8)
    for _ in range(2):
        metrics.engine_ready(fake_ready())
        assert samples(metrics)["spec_decode_budget_rows"] == 0
        step(metrics, SpeculationStats("", 2, 5, 6, 3, 0.5), budget=4)
    assert counts(metrics, "base") == [4, 10, 12, 6, 1.0]


def test_two_versions_of_one_name_add_up() -> None:
    metrics = Metrics(8)
    step(metrics, SpeculationStats("v1", 1, 2, 3, 1), SpeculationStats("v2", 1, 1, 1, 0), v1="one", v2="one")
    assert counts(metrics, "one")[:4] == [2, 3, 4, 1]


def test_drafts_that_cost_more_than_they_saved_take_seconds_away() -> None:
    metrics = Metrics(8)
    step(metrics, SpeculationStats("", 1, 2, 3, 1, 0.5))
    step(metrics, SpeculationStats("", 2, 3, 6, 1, 0.25))
    assert counts(metrics, "base")[-1] == pytest.approx(0.25)


def test_adapters_beyond_the_cap_share_one_label() -> None:
    metrics = Metrics(8)
    versions = [f"v{number}" for number in range(MAX_ADAPTER_LABELS + 3)]
    step(metrics, *(SpeculationStats(version, 1, 1) for version in versions), **{each: each for each in versions})
    step(metrics, *(SpeculationStats(version, 1, 1) for version in (*versions, "nameless")))
    assert counts(metrics, "other")[0] == 3 + 1


def test_promtool_finds_nothing_to_complain_about() -> None:
    metrics = Metrics(8)
    step(metrics, SpeculationStats("", 1, 2, 3, 1, 0.5), budget=3)
    assert complaints(metrics.render()) == (0, b"", b"")

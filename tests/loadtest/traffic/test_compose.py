"""From options to a run: which adapters are asked for, what a trace says, whose /metrics are read."""

import json
from pathlib import Path

import pytest

from perseid_loadtest.traffic.compose import (
    adapters_of,
    check_metrics,
    limits_of,
    plan_of,
    target_of,
    told,
    traced_adapters,
)
from perseid_loadtest.traffic.http_target import HttpTarget
from perseid_loadtest.traffic.options import LoadtestOptions, check
from perseid_server.errors import InvalidRequest
from tests.loadtest.traffic.peers import peer, says

URL = "http://h:1"


def options(**stated) -> LoadtestOptions:
    made = LoadtestOptions(target=URL, **stated)
    check(made)
    return made


@pytest.fixture
def trace(tmp_path: Path) -> str:
    """Asks for `a`, the base by its name, and whatever --adapters says."""
    lines = [{"at": 0.5, "adapter": "a"}, {"at": 1.0, "adapter": "base"}, {"at": 1.5}]
    (tmp_path / "trace").write_text("\n".join(map(json.dumps, lines)))
    return f"trace:{tmp_path / 'trace'}"


def test_adapters_are_checked_where_the_server_tells_what_it_has():
    assert adapters_of(options(adapters=("a,base",)), ("a", "b")) == ("a", "")
    assert adapters_of(options(adapters=("typo",)), None) == ("typo",)
    with pytest.raises(InvalidRequest, match="--adapters: http://h:1 has no adapter 'typo'; it lists a, b"):
        adapters_of(options(adapters=("typo",)), ("a", "b"))


def test_a_server_that_has_none_has_not_this_one():
    assert adapters_of(options(), ()) == ("",)
    with pytest.raises(InvalidRequest, match="no adapter 'typo'; it lists none"):
        adapters_of(options(adapters=("typo",)), ())


@pytest.mark.parametrize("served", [(), None])
def test_all_of_none_is_told(served):
    with pytest.raises(InvalidRequest, match="lists no adapter"):
        adapters_of(options(adapters=("all",)), served)


def test_a_traces_base_is_the_base(trace: str):
    plan = plan_of(options(arrivals=trace), ("b",), None)
    assert [plan.request(number, due).adapter for number, due in enumerate(plan.due())] == ["a", "", "b"]


def test_a_traces_adapters_are_asked_for_and_checked(trace: str):
    asked = options(arrivals=trace)
    plan = plan_of(asked, ("",), None)
    assert traced_adapters(asked, plan, ("a",)) == traced_adapters(asked, plan, None) == {"a", ""}
    with pytest.raises(InvalidRequest, match=r"--arrivals trace:.*has no adapter 'a'; it lists b"):
        traced_adapters(asked, plan, ("b",))


async def test_llama_server_knows_a_traces_adapters_by_their_names_in_it(trace: str):
    routes = {"/v1/models": {"data": [{"id": "m"}]}, "/lora-adapters": [{"id": 0, "path": "lora-a.gguf"}]}
    async with peer(routes) as url:
        target = target_of(LoadtestOptions(target=url, arrivals=trace))
        assert isinstance(target, HttpTarget)
        await target.open()
        await target.close()
    assert target.names == ("a",)


@pytest.mark.parametrize(("stated", "seconds"), [({}, 0.0), ({"warm_up": 2.0}, 2.0)])
def test_all_of_a_trace_counts_unless_it_is_said_otherwise(trace: str, stated, seconds):
    made = options(arrivals=trace, **stated)
    assert limits_of(made).warm_up_s == told(made)["warm_up"] == seconds


def test_other_traffic_warms_up():
    assert limits_of(options()).warm_up_s == told(options())["warm_up"] == 3.0
    assert told(options(warm_up=0.0))["warm_up"] == 0.0


def test_certificates_may_be_for_the_metrics_alone():
    made = LoadtestOptions(target=URL, metrics="https://h:2", ca=Path(__file__))
    check(made)


@pytest.mark.parametrize("answer", [says("", 404), says("", 401), says("<html>"), says("")])
async def test_metrics_that_were_asked_for_and_cannot_be_read_are_told_before_the_run(answer):
    async with peer({"/metrics": answer}) as url:
        with pytest.raises(InvalidRequest, match=f"^--metrics: {url}/metrics"):
            await check_metrics(options(metrics=url))
        await check_metrics(options())


async def test_metrics_that_can_be_read_are_not_complained_of():
    async with peer({"/metrics": says("a 1\n")}) as url:
        await check_metrics(options(metrics=url))

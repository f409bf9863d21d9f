"""Alert rules and the dashboard that we hand to operators: valid, tried, and about metrics that exist."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from perseid_loadtest.scrape_cost import filled
from tests.tools import require_tool

FOLDER = Path(__file__).parents[2] / "docs" / "monitoring"
ALERTS, DASHBOARD = FOLDER / "alerts.yml", FOLDER / "dashboard.json"
_NAME = re.compile(r"perseid_[a-z0-9_]+")


def promtool(*arguments: str) -> tuple[int, str]:
    command = [require_tool("promtool", "Debian package prometheus"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


def exposed() -> set[str]:
    """Every name of a sample that a server on which all has happened exposes."""
    metrics = filled(3)
    families = text_string_to_metric_families(metrics.render().decode())
    return {sample.name for family in families for sample in family.samples}


def panels() -> list[dict]:
    return json.loads(DASHBOARD.read_text())["panels"]


def queries() -> Iterator[str]:
    for panel in panels():
        yield from (target["expr"] for target in panel.get("targets", ()))


def names_in(text: str) -> set[str]:
    return set(_NAME.findall(text))


@pytest.mark.parametrize(
    "command",
    [
        ("check", "rules", str(ALERTS)),
        ("test", "rules", str(FOLDER / "rules_test.yml")),
        ("check", "config", str(FOLDER / "prometheus.yml")),
    ],
    ids=" ".join,
)
def test_promtool_agrees(command: tuple[str, ...]) -> None:
    status, told = promtool(*command)
    assert status == 0, told


def test_every_alert_is_tried_and_says_what_to_do() -> None:
    text = ALERTS.read_text()
    alerts = set(re.findall(r"- alert: (\w+)", text))
    assert set(re.findall(r'alertname="(\w+)"', (FOLDER / "rules_test.yml").read_text())) == alerts
    for annotation in ("summary", "action"):
        assert len(re.findall(rf"^ +{annotation}: ", text, re.MULTILINE)) == len(alerts)


def test_alerts_and_their_tests_name_metrics_that_exist() -> None:
    for path in (ALERTS, FOLDER / "rules_test.yml"):
        assert names_in(path.read_text()) - exposed() == set()


def test_the_dashboard_names_metrics_that_exist() -> None:
    told = set().union(*map(names_in, queries()))
    assert told - exposed() == set()
    variables = json.loads(DASHBOARD.read_text())
    assert names_in(json.dumps([variables["templating"], variables["annotations"]])) - exposed() == set()


def test_the_dashboard_leaves_no_metric_out() -> None:
    bare = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exposed()}
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for query in queries() for name in names_in(query)}
    assert bare - shown <= {"perseid_lora_requests_info", "perseid_lora_cache_info", "perseid_model_weight_bytes"}


def test_the_queries_are_promql(tmp_path: Path) -> None:
    """As recording rules, with Grafana's variables filled in, for promtool has no other way to read them."""
    filled_in = [
        query.replace("$__rate_interval", "1m").replace('instance=~"$instance"', 'instance=~".*"')
        for query in queries()
    ]
    rules = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(filled_in)]
    path = tmp_path / "panels.yml"
    path.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    status, told = promtool("check", "rules", str(path))
    assert status == 0, told


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels())
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_the_datasource_and_the_server_can_be_chosen() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert {variable["name"] for variable in dashboard["templating"]["list"]} == {"datasource", "instance"}
    for panel in dashboard["panels"]:
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert all("$instance" in target["expr"] for target in panel["targets"])
    titles = [panel["title"] for panel in dashboard["panels"] if panel["type"] == "row"]
    assert titles == [
        "Traffic", "Latency", "Engine", "Adapters", "Routing", "Speculation", "Rejections", "Processes"
    ]  # fmt: skip

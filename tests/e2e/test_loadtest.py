"""`perseid loadtest` against a real server: both transports, adapters in the mix, others that come and go."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.running import RunningServer

NAMED = 4
CHURNED = "churned-by-loadtest"


@pytest.mark.parametrize("transport", ["http", "grpc"])
def test_every_request_is_answered_once_and_in_full(
    server: RunningServer, adapter_folders: dict[str, Path], tmp_path: Path, transport: str
) -> None:
    target = server.http if transport == "http" else f"grpc://{server.grpc}"
    names, report = list(adapter_folders)[:NAMED], tmp_path / "run.json"
    command = [sys.executable, "-m", "perseid_server", "loadtest", "--target", target, "--json", str(report)]
    command += ["--rate", "4", "--duration", "4", "--warm-up", "1", "--prompt-tokens", "16", "--output-tokens", "4..8"]
    command += ["--adapters", "base", *names, "--popularity", "round-robin", "--metrics", server.http, "--seed", "11"]
    command += ["--churn", f"{CHURNED}={adapter_folders[names[0]]}", "--churn-every", "0.2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr

    run = json.loads(report.read_text())["run"]
    records = run["records"]
    assert [record["number"] for record in records] == list(range(len(records)))
    assert {record["adapter"] for record in records} == {"", *names}
    for record in records:
        assert record["error"] is None
        assert record["prompt_tokens"] == 16
        assert 4 <= record["output_tokens"] == sum(tokens for _, tokens in record["arrivals"]) <= 8
        assert record["planned"] <= record["arrivals"][0][0] <= record["ended"]
    assert {change["action"] for change in run["churn"]} == {"load", "replace", "unload"}
    assert not any(change["error"] for change in run["churn"])

    told = sum(record["output_tokens"] for record in records)
    counted = [{k: v for k, v in run[when].items() if k.startswith("perseid_generation_tokens_total")}
               for when in ("server_before", "server_after")]  # fmt: skip
    assert sum(counted[1].values()) - sum(counted[0].values()) == told

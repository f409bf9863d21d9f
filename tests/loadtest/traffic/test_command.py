"""`perseid loadtest`: one line for what is wrong with its options, and a run against a server that only streams."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from perseid_loadtest.traffic.options import LoadtestOptions, check
from perseid_loadtest.traffic.own_cost import fake_server
from tests.server.cli.running import Perseid

URL = ("--target", "http://127.0.0.1:1")


def shown(cert: str, key: str) -> tuple[str, ...]:
    """To a server that asks for a certificate."""
    return ("--client-cert", cert, "--client-key", key)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--target: expected http://HOST:PORT or grpc://HOST:PORT"),
        (("--target", "localhost:8000"), "--target: 'localhost:8000': expected http"),
        (("--target", "http://h:99999"), "--target: 'http://h:99999': expected http"),
        (("--target", "grpc://h"), "expected grpc://HOST:PORT"),
        (("--target", "grpc://h:1/path"), "nothing behind it"),
        ((*URL, "--rate", "1", "--concurrency", "2"), "--concurrency: allowed without --rate only"),
        ((*URL, "--duration", "1", "--requests", "2"), "--requests: allowed without --duration only"),
        ((*URL, "--rate", "inf"), "--rate: expected a finite number"),
        ((*URL, "--rate", "1e6"), "--rate: expected from 0.000001 to 100,000 requests a second"),
        ((*URL, "--rate", "1e308", "--arrivals", "gamma:1000"), "--rate: expected from 0.000001 to 100,000"),
        ((*URL, "--rate", "1e-320", "--arrivals", "gamma:0.01"), "--rate: expected from 0.000001 to 100,000"),
        ((*URL, "--arrivals", "gamma:0.5"), "--arrivals: needs --rate"),
        ((*URL, "--arrivals", "trace:x", "--concurrency", "1"), "--concurrency: allowed without --arrivals trace"),
        ((*URL, "--arrivals", "trace:x", "--rate", "1"), "--rate: leave it out"),
        ((*URL, "--rate", "1", "--arrivals", "trace"), "--arrivals 'trace'"),
        ((*URL, "--sweep"), "--sweep: needs --slo"),
        ((*URL, "--sweep", "--slo", "ttft=1s", "--concurrency", "1"), "--concurrency: allowed without --sweep"),
        ((*URL, "--slo", "ttft"), "slo: "),
        ((*URL, "--adapters", "a,,b"), "--adapters: 'a,,b'"),
        ((*URL, "--adapters", "a", "--popularity", "hot:b"), "not among --adapters"),
        ((*URL, "--prompt-tokens", "/none"), "--prompt-tokens '/none'"),
        ((*URL, "--output-tokens", "9..3"), "--output-tokens 9..3"),
        ((*URL, "--churn", "a"), "--churn: expected NAME=SOURCE"),
        ((*URL, "--ca", "/none"), "--ca: allowed with https:// and grpcs:// only"),
        (("--target", "https://h", "--ca", "/none"), "--ca: /none: no such file"),
        (("--target", "https://h", "--ca", __file__), "not a PEM file"),
        (("--target", "https://h", "--client-cert", __file__), "expected --client-cert and --client-key together"),
        (("--target", "grpcs://h:1", "--client-key", __file__), "expected --client-cert and --client-key together"),
        ((*URL, *shown("/none", "/none")), "--client-cert: allowed with https:// and grpcs:// only"),
        (("--target", "https://h", *shown("/none", "/none")), "--client-cert: /none: no such file"),
        (("--target", "https://h", *shown(__file__, "/none")), "--client-key: /none: no such file"),
        (("--target", "https://h", *shown(__file__, __file__)), "--client-cert: "),
        ((*URL, "--api-key", "a\nb"), "--api-key: expected printable ASCII"),
        ((*URL, "--metrics-key", "é"), "--metrics-key: expected printable ASCII"),
        ((*URL, "--metrics", "h:1"), "--metrics: 'h:1': expected http"),
        ((*URL, "--json", "/"), "--json: / cannot be written (is a directory)"),
        ((*URL, "--json", "/dev/null/x"), "--json: /dev/null/x cannot be written (not a directory); expected a file"),
        ((*URL, "--html", "/dev/null/x"), "--html: /dev/null/x cannot be written (not a directory)"),
        (("--compare", "/none", "b", "--html", "/dev/null/x"), "--html: /dev/null/x cannot be written"),
        ((*URL, "--json", "x", "--html", "x"), "--html: x is --json's file too"),
        ((*URL, "--compare", "a", "b"), "--compare: makes no run"),
        (("--compare", "/none", "b"), "/none"),
        ((*URL, "--own-cost"), "--own-cost: makes no run"),
        (URL, "http://127.0.0.1:1: cannot connect (connection refused); is a server running there?"),
        (("--target", "grpc://127.0.0.1:1"), "127.0.0.1:1: failed to connect"),
    ],
)
def test_what_is_wrong_is_one_line(perseid: Perseid, arguments: tuple[str, ...], message: str):
    done = perseid("loadtest", *arguments)
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("perseid: ")
    assert message in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    "option", ["--rate=0", "--concurrency=0", "--requests=x", "--stop-on-errors=2", "--warm-up=-1"]
)
def test_numbers_out_of_range_are_one_line(perseid: Perseid, option: str):
    done = perseid("loadtest", *URL, option)
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert option.partition("=")[0] in done.err


def test_without_aiohttp_the_extra_is_named(perseid: Perseid, monkeypatch: pytest.MonkeyPatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "aiohttp" else found(name, *rest)
    )
    done = perseid("loadtest", *URL)
    assert (done.status, done.err.count("\n")) == (1, 1)
    assert "pip install 'perseid[loadtest]'" in done.err


def test_keys_are_not_part_of_the_report():
    options = LoadtestOptions(target="http://h:1", api_key="secret", metrics_key="secret", rate=2.0, sweep=False)
    check(options)
    assert "secret" not in str(options.told())
    assert options.told()["rate"] == 2.0


def test_a_run_is_reported_and_written(perseid: Perseid, tmp_path: Path):
    with fake_server(0.001) as url:
        arguments = ("--target", url, "--concurrency", "2", "--requests", "20", "--warm-up", "0", "--seed", "3")
        done = perseid("loadtest", *arguments, "--output-tokens", "5", "--json", str(tmp_path / "run.json"))
    assert (done.status, done.err) == (0, "")
    assert "TTFT" in done.out
    run = json.loads((tmp_path / "run.json").read_text())["run"]
    assert len(run["records"]) == 20
    assert all(record["output_tokens"] == 5 and record["error"] is None for record in run["records"])
    assert (run["options"]["seed"], run["options"]["concurrency"], run["options"]["requests"]) == (3, 2, 20)


def test_metrics_that_cannot_be_read_end_it_before_the_run(perseid: Perseid):
    with fake_server(0.001) as url:
        done = perseid("loadtest", "--target", url, "--metrics", f"{url}/v1", "--requests", "1")
    assert (done.status, done.out) == (1, "")
    assert done.err == f"perseid: --metrics: {url}/metrics answers HTTP 404\n"


def test_a_trace_counts_from_its_beginning_and_its_adapters_are_asked_for(perseid: Perseid, tmp_path: Path):
    """The server lists no adapter, and takes any name."""
    (tmp_path / "trace").write_text('0\n{"at": 0.01, "adapter": "base"}\n{"at": 0.02, "adapter": "a"}\n')
    report = tmp_path / "run.json"
    with fake_server(0.001) as url:
        done = perseid("loadtest", "--target", url, "--arrivals", f"trace:{tmp_path / 'trace'}", "--json", str(report))
    assert (done.status, done.err) == (0, "")
    records = json.loads(report.read_text())["run"]["records"]
    assert [(record["adapter"], record["warm_up"]) for record in records] == [("", False), ("", False), ("a", False)]


def test_a_sweep_tells_all_that_it_tried(perseid: Perseid, tmp_path: Path):
    """Nobody could keep this limit, so that no rate is good."""
    with fake_server(0.01) as url:
        arguments = ("--target", url, "--sweep", "--rate", "640", "--slo", "e2e=1us", "--output-tokens", "2")
        done = perseid(
            "loadtest", *arguments, "--requests", "5", "--warm-up", "0", "--json", str(tmp_path / "run.json")
        )
    assert done.status == 1
    assert "no rate met the limits; the lowest tried was 10 a second" in done.out
    tried = json.loads((tmp_path / "run.json").read_text())["run"]["options"]["sweep"]
    assert [one["rate"] for one in tried] == [640.0, 320.0, 160.0, 80.0, 40.0, 20.0, 10.0]


def test_ctrl_c_ends_the_run_and_still_reports(tmp_path: Path):
    """Answers that would take minutes; the interrupt comes once the run has begun."""
    report = tmp_path / "run.json"
    with fake_server(1.0) as url:
        command = [sys.executable, "-m", "perseid_server", "loadtest", "--target", url, "--concurrency", "3"]
        command += ["--output-tokens", "1000", "--warm-up", "0", "--json", str(report)]
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while connections(url) < 3:
            assert running.poll() is None
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=30)
    assert (running.returncode, err) == (130, "")
    assert "interrupted by the user" in out
    run = json.loads(report.read_text())["run"]
    assert run["stopped_early"] == "interrupted by the user"
    assert [record["error"] for record in run["records"]] == ["interrupted"] * 3


def connections(url: str) -> int:
    """Established ones to the server's port (Linux)."""
    port = f":{int(url.rpartition(':')[2]):04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return sum(line.split()[2].endswith(port) and line.split()[3] == "01" for line in lines)

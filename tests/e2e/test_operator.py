"""What an operator sees of a real server: log, traces, health, state, before and after its engine is killed."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.e2e.client import Job, generate
from tests.e2e.running import RunningServer, running_server
from tests.server.observe.collector import collecting

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
SECRET = "my own secret words"


def calls(server: RunningServer) -> list[dict[str, Any]]:
    """Lines of calls so far."""
    lines = [json.loads(line) for line in server.lines if line.startswith("{")]
    return [line for line in lines if line["event"] == "call"]


def test_an_operator_sees_what_happens(
    adapter_folders: dict[str, Path], prompts: list[tuple[int, ...]], tmp_path: Path
) -> None:
    name, folder = next(iter(adapter_folders.items()))
    body = {"model": name, "prompt": SECRET * 10, "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    with collecting() as collector:
        options = f"--adapter={name}={folder}", "--log-format", "json", "--trace-endpoint", collector.endpoint
        with running_server(*options, "--trace-sample", "1", store=tmp_path / "store") as server:
            with grpc.insecure_channel(server.grpc) as channel:
                watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=120)
                assert next(watch).status == SERVING
                told = httpx.post(f"{server.http}/v1/completions", json=body, timeout=60)
                generate(server.grpc, Job(prompts[0], name, 5))
                state = httpx.get(f"{server.http}/debug/state", timeout=60).json()
                assert state["engine"]["answered"]
                assert [(one["name"], one["location"]) for one in state["adapters"]["shown"]] == [(name, "device")]
                assert state["kv"]["cached"] > 0 == state["kv"]["used"]
                os.kill(server.engine_pid(), signal.SIGKILL)
                assert [next(watch).status for _ in range(2)] == [NOT_SERVING, SERVING]
            state = httpx.get(f"{server.http}/debug/state", timeout=60).json()
            assert (state["status"], state["engine"]["restarts"], state["kv"]["cached"]) == ("ready", 1, 0)
        assert server.process.returncode == 0
        over_http, over_grpc = calls(server)[:2]
        assert over_http["request_id"] == told.headers["X-Request-Id"]
        assert (over_http["route"], over_http["generated_tokens"]) == ("POST /v1/completions", 5)
        assert (over_grpc["status"], over_grpc["model"]) == ("OK", name)
        assert SECRET not in "".join(server.lines)
        spans = [span for span in collector.spans if span.trace == over_http["trace_id"]]
        assert {span.name for span in spans} == {"POST /v1/completions", "queue", "adapter load", "prefill", "decode"}

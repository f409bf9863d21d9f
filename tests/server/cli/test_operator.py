"""What an operator sees of `perseid serve`: log, traces, health and state, before and after its engine is killed.

All of the command but the model: the engine is a process of its own, over the fake one.
"""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from perseid_server.cli import serve
from perseid_server.cli.serve import RunningServer
from perseid_server.config import ServeConfig
from perseid_server.ipc.engine_client import EngineProcess
from tests.fakes import byte_bundle
from tests.server.observe.collector import Collector, collecting
from tests.server.stack import write_adapter

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
SECRET = "a users own words"
EXPECTED = {"POST /v1/completions", "queue", "adapter load", "prefill", "decode"}
BODY = {"model": "one", "prompt": SECRET, "max_tokens": 5, "temperature": 0}


@pytest.fixture
def collector() -> Any:
    with collecting() as found:
        yield found


@pytest_asyncio.fixture
async def running(
    collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> AsyncIterator[RunningServer]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(request.config.rootpath), *filter(None, sys.path)]))
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")  # ms
    monkeypatch.setattr(serve, "EngineProcess", partial(EngineProcess, entry="tests.server.ipc.engines:build"))
    monkeypatch.setattr(serve, "resolve_model", lambda _: SimpleNamespace(name="tiny"))
    monkeypatch.setattr(serve, "export_tokenizer", lambda _: byte_bundle())
    config = ServeConfig(
        http_port=0,
        grpc_port=0,
        store=tmp_path / "store",
        adapter=(f"one={write_adapter(tmp_path / 'one')}",),
        trace_endpoint=collector.endpoint,
        trace_sample=1.0,
        log_level="error",  # of the engine
    )
    async with serve._server(config) as found:
        yield found


def names_of(collector: Collector, trace: str) -> set[str]:
    """Of the spans of one trace."""
    return {span.name for span in collector.spans if span.trace == trace}


async def until(condition: Callable[[], bool]) -> None:
    """Return when it holds."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def get(running: RunningServer, path: str) -> httpx.Response:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{running.addresses.http_port}", timeout=30) as client:
        return await (client.post(path, json=BODY) if path.startswith("/v1") else client.get(path))


async def test_an_operator_sees_what_happens(
    running: RunningServer, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{running.addresses.grpc_port}") as channel, asyncio.timeout(20):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        over_http = await get(running, "/v1/completions")
        asked = pb.GenerateRequest(prompt=SECRET, adapter="one", sampling=pb.SamplingParams(max_tokens=5))
        over_grpc = await stubs.GenerationStub(channel).Generate(asked)
        before = (await get(running, "/debug/state")).json()
        os.kill(before["engine"]["pid"], signal.SIGKILL)
        assert (await watch.read()).status == NOT_SERVING
        assert (await watch.read()).status == SERVING
        watch.cancel()
    after = (await get(running, "/debug/state")).json()

    shown = [(one["name"], one["location"]) for one in before["adapters"]["shown"]]
    assert (shown, before["engine"]["answered"], before["kv"]["cached"] > 0) == ([("one", "device")], True, True)
    assert (after["status"], after["engine"]["restarts"], after["kv"]["cached"]) == ("ready", 1, 0)
    lines = [record.fields for record in caplog.records if record.name == "perseid_server.calls"]
    assert [(line["route"], line["generated_tokens"]) for line in lines if "model" in line] == [
        ("POST /v1/completions", 5), ("perseid.v1.Generation/Generate", 5)
    ]  # fmt: skip
    assert lines[0]["request_id"] == over_http.headers["X-Request-Id"]
    assert lines[1]["request_id"] == over_grpc.request_id
    assert SECRET not in caplog.text
    await until(lambda: names_of(collector, lines[0]["trace_id"]) == EXPECTED)

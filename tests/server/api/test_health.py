"""/health, /ready and gRPC health: alive is not ready, and both transports say the same at the same moment."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from perseid_server.api.grpc.server import SERVICES
from perseid_server.api.status import ServerStatus
from perseid_server.engine.config import EngineConfig
from perseid_server.ipc.engine_client import EngineProcess
from tests.server.stack import LiveStack, Stack

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


@pytest_asyncio.fixture
async def channel(live: LiveStack) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(live.grpc) as channel:
        yield channel


@pytest.fixture
def health(channel: grpc.aio.Channel) -> health_pb2_grpc.HealthStub:
    return health_pb2_grpc.HealthStub(channel)


def asked(service: str = "") -> Any:
    return health_pb2.HealthCheckRequest(service=service)


async def get(live: LiveStack, path: str) -> httpx.Response:
    async with live.http() as client:
        return await client.get(path)


async def status_of(watch: Any) -> int:
    async with asyncio.timeout(20):
        return (await watch.read()).status


@pytest.mark.parametrize(
    ("status", "trouble", "text"),
    [
        ("starting", "", "engine starting"),
        ("restarting", "", "engine restarting"),
        ("restarting", "was ended by SIGKILL", "engine restarting: it was ended by SIGKILL"),
        ("restarting", "could not be started: /srv/model: no such file", "engine restarting: it could not be started"),
        ("stopped", "", "engine stopped"),
    ],
)
async def test_both_say_why_and_health_does_not_care(live: LiveStack, health, status, trouble, text) -> None:
    assert ((await get(live, "/ready")).status_code, (await get(live, "/ready")).json()) == (200, {"status": "ready"})
    live.stack.engine.trouble, live.stack.engine.status = trouble, status
    told = await get(live, "/ready")
    assert (told.status_code, told.json(), told.headers["Retry-After"]) == (503, {"status": text}, "1")
    for service in ("", *SERVICES):
        assert (await health.Check(asked(service))).status == NOT_SERVING
    listed = (await health.List(health_pb2.HealthListRequest())).statuses
    assert {name: one.status for name, one in listed.items()} == dict.fromkeys(("", *SERVICES), NOT_SERVING)
    assert (await get(live, "/health")).json() == {"status": "alive"}
    live.stack.engine.status = "ready"
    assert (await health.Check(asked())).status == SERVING
    assert (await get(live, "/ready")).status_code == 200


@pytest.mark.parametrize("service", ["", *SERVICES])
async def test_who_watches_is_told_each_change(live: LiveStack, health, service: str) -> None:
    watches = [health.Watch(asked(service)) for _ in range(3)]
    for status, told in (("ready", SERVING), ("restarting", NOT_SERVING), ("ready", SERVING), ("stopped", NOT_SERVING)):
        live.stack.engine.status = status
        assert [await status_of(watch) for watch in watches] == [told] * 3


async def test_what_changes_nothing_is_not_told(live: LiveStack, health) -> None:
    watch = health.Watch(asked())
    assert await status_of(watch) == SERVING
    live.stack.engine.status = "restarting"
    assert await status_of(watch) == NOT_SERVING
    for status in ("starting", "failed"):
        live.stack.engine.status = status
        assert (await get(live, "/ready")).status_code == 503  # the watcher has looked meanwhile
    live.stack.engine.status = "ready"
    assert await status_of(watch) == SERVING


async def test_a_server_that_drains_is_not_ready_while_it_still_answers(live: LiveStack, channel, health) -> None:
    live.stack.engine.hold()
    watch = health.Watch(asked())
    assert await status_of(watch) == SERVING
    message = pb.GenerateRequest(prompt="say", sampling=pb.SamplingParams(max_tokens=3))
    call = stubs.GenerationStub(channel).Generate(message)
    await live.stack.engine.submissions(1)
    draining = asyncio.create_task(live.stack.service.drain(60))
    assert await status_of(watch) == NOT_SERVING
    assert (await get(live, "/ready")).json() == {"status": "shutting down"}
    assert not call.done()
    live.stack.engine.go_on()
    assert (await call).usage.completion_tokens == 3
    await draining


async def test_a_service_that_is_not_there(health) -> None:
    assert await status_of(health.Watch(asked("perseid.v9.Nothing"))) == UNKNOWN
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await health.Check(asked("perseid.v9.Nothing"))
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_the_cause_of_a_restart_is_told(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(request.config.rootpath), *filter(None, sys.path)]))
    engine = EngineProcess(EngineConfig(), entry="tests.server.ipc.engines:build", log_level="CRITICAL")
    status = ServerStatus(stack.service, lambda: engine.status, lambda: engine.trouble)
    engine.on_status(lambda _: status.changed())
    ended = asyncio.Event()
    engine.on_ending(lambda _: ended.set())
    assert status.describe() == "engine starting"
    try:
        await engine.start()
        assert status.describe() == "ready"
        change = status.next_change()
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        await change.wait()
        assert not status.is_ready
        await ended.wait()
        assert status.describe() == "engine restarting: it was ended by SIGKILL"
        while not status.is_ready:
            await status.next_change().wait()
    finally:
        await engine.stop()

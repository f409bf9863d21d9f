"""The order in which a server ends: what is cut off is answered, told, traced and charged like any call."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import httpx
import pytest
import pytest_asyncio

from perseid_server.access.ledger import Ledger
from perseid_server.api.server import ApiServer
from perseid_server.cli import serve
from perseid_server.config import ServeConfig
from perseid_server.ipc import connection
from perseid_server.ipc.engine_client import EngineProcess
from tests.fakes import byte_bundle
from tests.server.observe.collector import Collector, collecting

BODY = {"model": "tiny", "prompt": "x", "max_tokens": 200, "ignore_eos": True}


class Stopping(ApiServer):
    """Asks for something while it stops, as a client may."""

    asked: ClassVar[list[int]] = []
    written: ClassVar[list[str]] = []

    async def stop(self) -> None:
        if self._http is not None:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self._socket.getsockname()[1]}") as client:
                told = await client.post("/tokenize", json={"prompt": "long " * 5000})
            self.asked.append(told.status_code)
        await super().stop()
        self.written.append("api")


@pytest_asyncio.fixture
async def collector(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Collector]:
    monkeypatch.setattr(connection, "STOP_TIMEOUT_S", 0.2)
    monkeypatch.setattr(serve, "EngineProcess", partial(EngineProcess, entry="tests.server.ipc.engines:build"))
    monkeypatch.setattr(serve, "resolve_model", lambda _: SimpleNamespace(name="tiny"))
    monkeypatch.setattr(serve, "export_tokenizer", lambda _: byte_bundle())
    monkeypatch.setattr(serve, "ApiServer", Stopping)
    monkeypatch.setattr(Stopping, "asked", [])
    monkeypatch.setattr(Stopping, "written", [])
    monkeypatch.setattr(Ledger, "stop", lambda _: Stopping.written.append("ledger"))
    with collecting() as collector:
        yield collector


async def test_a_call_that_is_cut_off(collector: Collector, tmp_path: Path) -> None:
    config = ServeConfig(
        http_port=0, grpc_port=0, store=tmp_path / "store", trace_endpoint=collector.endpoint, trace_sample=1.0
    )
    async with serve._server(config) as running:
        client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{running.addresses.http_port}", timeout=30)
        engine = (await client.get("/debug/state")).json()["engine"]
        os.kill(engine["pid"], signal.SIGSTOP)
        cut = asyncio.create_task(client.post("/v1/completions", json=BODY))
        while (await client.get("/debug/state")).json()["queue"]["requests"] == 0:
            pass
        await running.service.drain(0)
    assert (await cut).status_code == 503
    await client.aclose()
    statuses = [one.attributes["http.response.status_code"] for one in collector.spans if "completions" in one.name]
    assert statuses == [503]
    assert Stopping.asked == [200]
    assert Stopping.written == ["api", "ledger"]


async def test_what_is_left_of_the_grace_time_is_for_answers_that_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    now, told = [100.0], {}
    monkeypatch.setattr(serve, "time", SimpleNamespace(monotonic=lambda: now[0]))

    class Part:
        def __init__(self, name: str, takes_s: float) -> None:
            self.name, self.takes_s = name, takes_s

        async def drain(self, grace_s: float) -> None:
            told[self.name] = grace_s
            now[0] += self.takes_s

    running = SimpleNamespace(service=Part("service", 3.0), registry=Part("registry", 0.0), api=Part("api", 0.0))
    await serve._drain(running, 10.0)
    assert told == {"service": 10.0, "registry": 10.0, "api": 7.0}

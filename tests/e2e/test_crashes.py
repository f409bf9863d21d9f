"""Proof 4: the engine and the server are killed, and what was loaded is served again."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import grpc
import httpx
import pytest

from tests.e2e.client import Job, Streams, generate, tokens_of
from tests.e2e.running import RunningServer, running_server, start_server, stop_server


def adapters_of(server: RunningServer) -> set[str]:
    """Names of the loaded adapters."""
    models = httpx.get(f"{server.http}/v1/models").json()["data"]
    return {model["id"] for model in models if model.get("parent")}


def test_a_killed_engine_answers_unavailable_and_comes_back_with_its_adapters(
    adapter_folders: dict[str, Path], prompts: list[tuple[int, ...]], tmp_path: Path
) -> None:
    names = list(adapter_folders)[:3]
    named = [f"--adapter={name}={adapter_folders[name]}" for name in names]
    jobs = [Job(prompts[i], ([*names, None] * 2)[i], 400) for i in range(8)]
    with running_server(*named, store=tmp_path / "store") as server:
        before = tokens_of(generate(server.grpc, Job(prompts[3], names[0], 16)))
        streams = Streams(server.grpc, jobs)
        while not streams.all_started():
            time.sleep(0.01)
        first_engine = server.engine_pid()
        os.kill(first_engine, signal.SIGKILL)

        for error in streams.errors():
            assert isinstance(error, grpc.RpcError)
            assert error.code() is grpc.StatusCode.UNAVAILABLE
        streams.close()
        deadline = time.monotonic() + 60
        told = set()
        while server.metric("perseid_engine_restarts_total") == 0 or not server.is_ready():
            told.add(server.readiness())
            assert time.monotonic() < deadline
        assert "engine restarting: it was ended by SIGKILL" in told

        assert server.engine_pid() != first_engine
        assert adapters_of(server) == set(names)
        assert tokens_of(generate(server.grpc, Job(prompts[3], names[0], 16))) == before


def test_a_killed_server_serves_the_same_adapters_after_a_restart(
    adapter_folders: dict[str, Path], prompts: list[tuple[int, ...]], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    folder = next(iter(adapter_folders.values()))
    job = Job(prompts[0], "kept", 16)
    with running_server(f"--adapter=kept={folder}", store=store) as server:
        answer = tokens_of(generate(server.grpc, job))
        server.process.kill()
        server.process.wait()
    with running_server(store=store) as server:
        assert adapters_of(server) == {"kept"}
        assert tokens_of(generate(server.grpc, job)) == answer


@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.1])
def test_a_server_killed_during_a_load_opens_its_store_again(
    adapter_folders: dict[str, Path], tmp_path: Path, delay_s: float
) -> None:
    store = tmp_path / "store"
    names = list(adapter_folders)
    root = adapter_folders[names[0]].parent
    server = start_server(f"--adapter=kept={adapter_folders[names[0]]}", "--adapter-root", str(root), store=store)
    try:
        server.wait_until_ready()
        load = {"lora_name": "late", "lora_path": str(adapter_folders[names[7]])}
        threading.Timer(delay_s, server.process.kill).start()
        with contextlib.suppress(httpx.HTTPError):  # answered just before the end, or cut off
            httpx.post(f"{server.http}/v1/load_lora_adapter", json=load, timeout=10)
        server.process.wait(timeout=10)
    finally:
        stop_server(server)
    with running_server(store=store) as again:
        assert "kept" in adapters_of(again)
        assert adapters_of(again) <= {"kept", "late"}

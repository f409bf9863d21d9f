"""SIGTERM and Ctrl-C to a real server, whatever it does just then: clients are told, its status is right, and no engine
process is left.
"""

import os
import signal
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import pytest

from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from perseid_server.adapters.store import AdapterStore
from tests.chaos.engines import BEGINS_WHEN_TOLD
from tests.chaos.processes import engine_of, has_ended, is_alive, wait_for
from tests.chaos.serve_under_test import BASE
from tests.chaos.sites import Site, import_path, running_site
from tests.e2e.running import RunningServer
from tests.server.stack import write_adapter

SHORT, LONG, ENDLESS = 50, 300, 1400  # tokens, of which a thousand take a second
WHEN_TOLD = "tests.chaos.engines:build_when_told"


class Callers:
    """Calls over both transports, each in a thread."""

    def __init__(self, server: RunningServer) -> None:
        self._http, self._channel = server.http, grpc.insecure_channel(server.grpc)
        self._pool = ThreadPoolExecutor(16)
        self._calls: list[Future[str]] = []

    def begin(self, num_tokens: int) -> None:
        """One call of each transport."""
        self._calls += [self._pool.submit(self._by_http, num_tokens), self._pool.submit(self._by_grpc, num_tokens)]

    def ends(self) -> Counter[str]:
        """How all of them ended."""
        return Counter(call.result(120) for call in self._calls)

    def _by_http(self, num_tokens: int) -> str:
        body = {"model": BASE, "prompt": "say", "max_tokens": num_tokens, "ignore_eos": True}
        answer = httpx.post(f"{self._http}/v1/completions", json=body, timeout=120)
        assert answer.status_code in {200, 503}, answer.text
        return "finished" if answer.status_code == 200 else answer.json()["error"]["message"]

    def _by_grpc(self, num_tokens: int) -> str:
        sampling = pb.SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        call = stubs.GenerationStub(self._channel).GenerateStream
        try:
            chunks = list(call(pb.GenerateRequest(prompt="say", sampling=sampling), timeout=120))
        except grpc.RpcError as error:
            return error.details() if error.code() is grpc.StatusCode.UNAVAILABLE else f"{error.code()}"
        return "finished" if chunks[-1].finish_reason == pb.FINISH_REASON_LENGTH else "cut off"


def test_what_runs_is_finished_and_what_comes_is_refused(fake: Site, tmp_path: Path) -> None:
    with running_site(fake, tmp_path / "store", "--grace", "60") as server:
        engine, callers = engine_of(server), Callers(server)
        callers.begin(LONG)
        wait_for(lambda: server.metric("perseid_num_requests_running") == 2)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: not server.is_ready())
        late = Callers(server)
        late.begin(SHORT)
        assert late.ends() == {"the server is shutting down": 2}
        assert callers.ends() == {"finished": 2}
        assert has_ended(server, engine) == 0
        assert not [line for line in server.lines if "Traceback" in line or "still works" in line]


def test_what_has_no_end_within_the_grace_is_told(fake: Site, tmp_path: Path) -> None:
    with running_site(fake, tmp_path / "store", "--grace", "0.2") as server:
        engine, callers = engine_of(server), Callers(server)
        callers.begin(ENDLESS)
        wait_for(lambda: server.metric("perseid_num_requests_running") == 2)
        server.process.send_signal(signal.SIGINT)
        assert callers.ends() == {"the server is shutting down": 2}
        assert has_ended(server, engine) == 0


@pytest.mark.chaos
def test_while_it_starts(fake: Site, tmp_path: Path) -> None:
    told = {"PERSEID_TEST_ENGINE": WHEN_TOLD, "PERSEID_TEST_GATE": str(tmp_path / "gate")}
    with running_site(fake, tmp_path / "store", wait=False, **told) as server:
        wait_for((tmp_path / "gate.waiting").exists, "a start")
        engine = engine_of(server)
        server.process.send_signal(signal.SIGTERM)
        assert has_ended(server, engine) == 0


def test_a_server_killed_before_its_engine_process_could_ask_to_end_with_it(fake: Site, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BEGINS_WHEN_TOLD)
    told = {"PERSEID_TEST_ENGINE": WHEN_TOLD, "PERSEID_TEST_GATE": str(tmp_path / "gate")}
    told["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *import_path()])
    with running_site(fake, tmp_path / "store", wait=False, **told) as server:
        engine = engine_of(server)
        server.process.kill()
        server.process.wait(120)
        assert is_alive(engine), "it has ended: the test proves nothing"
        (tmp_path / "gate.begin").touch()
        wait_for(lambda: not is_alive(engine), "the end of the engine")
        assert not (tmp_path / "gate.waiting").exists(), "it began to build a model for nobody"


def test_while_an_adapter_loads(fake: Site, tmp_path: Path) -> None:
    """A load that has begun is made whole and answered, though it takes longer than everything else; a new one is
    refused."""
    held, store = tmp_path / "held", tmp_path / "store"
    folder = write_adapter(tmp_path / "roots" / "late", seed=9)
    body = {"lora_name": "late", "lora_path": str(folder)}
    told = {"PERSEID_TEST_SLOW_DISK": str(held)}
    with (
        running_site(fake, store, "--adapter-root", str(folder.parent), "--grace", "60", **told) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        engine = engine_of(server)
        held.touch()
        load = pool.submit(httpx.post, f"{server.http}/v1/load_lora_adapter", json=body, timeout=120)
        wait_for(lambda: any((store / "tmp").iterdir()), "a copy")
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: not server.is_ready())
        refused = httpx.post(f"{server.http}/v1/load_lora_adapter", json=body | {"lora_name": "later"})
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
        held.unlink()
        assert load.result().status_code == 200
        assert has_ended(server, engine) == 0
    entries = AdapterStore(store).entries()
    assert "late" in entries
    assert list((store / "tmp").iterdir()) == []


def test_a_disk_that_takes_longer_than_the_grace_is_not_waited_for(fake: Site, tmp_path: Path) -> None:
    """Also with more loads than asyncio has threads. What they leave by halves is gone at the next start."""
    held, store = tmp_path / "held", tmp_path / "store"
    folders = [
        write_adapter(tmp_path / "roots" / str(seed), seed=seed) for seed in range(9, 9 + (os.cpu_count() or 1) + 8)
    ]
    told = {"PERSEID_TEST_SLOW_DISK": str(held)}
    with (
        running_site(
            fake,
            store,
            "--adapter-root",
            str(tmp_path / "roots"),
            "--grace",
            "0.2",
            "--trace-endpoint",
            "http://127.0.0.1:9",
            **told,
        ) as server,
        ThreadPoolExecutor(len(folders)) as pool,
    ):
        engine = engine_of(server)
        held.touch()
        for folder in folders:
            body = {"lora_name": f"late-{folder.name}", "lora_path": str(folder)}
            pool.submit(httpx.post, f"{server.http}/v1/load_lora_adapter", json=body, timeout=120)
        wait_for(lambda: any((store / "tmp").iterdir()), "a copy")
        server.process.send_signal(signal.SIGTERM)
        assert has_ended(server, engine) == 0
        assert held.exists()
        assert any((store / "tmp").iterdir()), "all was done: the test proves nothing"
    opened = AdapterStore(store)
    assert not any(name.startswith("late-") for name in opened.entries())
    assert list((store / "tmp").iterdir()) == []
    assert {folder.name for folder in (store / "versions").iterdir()} == {
        entry.version for entry in opened.entries().values()
    }


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_base_that_is_downloaded_is_not_waited_for(fake: Site, tmp_path: Path, number: signal.Signals) -> None:
    held = tmp_path / "held"
    held.touch()
    told = {"PERSEID_TEST_SLOW_HUB": str(held)}
    with running_site(fake, tmp_path / "store", wait=False, **told) as server:
        wait_for((tmp_path / "held.waiting").exists, "a download")
        server.process.send_signal(number)
        assert has_ended(server) == 0
        assert held.exists()


@pytest.mark.chaos
def test_while_the_engine_starts_again(fake: Site, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    told = {"PERSEID_TEST_ENGINE": WHEN_TOLD, "PERSEID_TEST_GATE": str(gate)}
    with running_site(fake, tmp_path / "store", **told) as server:
        gate.unlink()
        first = engine_of(server)
        os.kill(first, signal.SIGKILL)
        second = engine_of(server, other_than=first)
        server.process.send_signal(signal.SIGTERM)
        assert has_ended(server, first, second) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.chaos)])
def test_a_second_signal_ends_it_at_once(fake: Site, tmp_path: Path, number: signal.Signals) -> None:
    with running_site(fake, tmp_path / "store", "--grace", "60") as server:
        engine, callers = engine_of(server), Callers(server)
        callers.begin(ENDLESS)
        wait_for(lambda: server.metric("perseid_num_requests_running") == 2)
        server.process.send_signal(number)
        wait_for(lambda: not server.is_ready())
        server.process.send_signal(number)
        assert has_ended(server, engine) == 128 + number

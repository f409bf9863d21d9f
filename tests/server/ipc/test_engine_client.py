"""The supervisor over a real child process: what happens when it dies, hangs, or will not start."""

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from unittest.mock import Mock

import msgspec
import pytest
import uvloop

from perseid_server.engine.adaptation import BASE_COLUMN, Adaptation, Routing
from perseid_server.engine.config import EngineConfig
from perseid_server.engine.messages import SequenceOutput, Shutdown, StepOutputs, Submit
from perseid_server.errors import InvalidRequest, Unavailable
from perseid_server.ipc import connection, engine_client
from perseid_server.ipc.connection import Connection
from perseid_server.ipc.endings import EngineGone
from perseid_server.ipc.engine_client import EngineProcess, EngineStatus
from perseid_server.model.sampling_params import SamplingParams
from tests.fakes import expected

PROMPT = tuple(b"say")


@pytest.fixture(autouse=True)
def repository_is_importable(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The child finds the tests' engines, and the same packages as the tests."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(request.config.rootpath), *filter(None, sys.path)]))


@asynccontextmanager
async def running(
    build: str = "build", *, step_timeout_s: float | None = None, **config: object
) -> AsyncIterator[EngineProcess]:
    """A started engine process, stopped at the end."""
    entry = f"tests.server.ipc.engines:{build}"
    engine = EngineProcess(EngineConfig(**config), step_timeout_s=step_timeout_s, entry=entry, log_level="CRITICAL")
    try:
        await engine.start()
        yield engine
    finally:
        await engine.stop()


def submit(
    name: str = "r", num_tokens: int = 6, adapter: str | None = None, prompt: tuple[int, ...] = PROMPT
) -> Submit:
    return Submit(name, prompt, SamplingParams(max_tokens=num_tokens, temperature=0.0), Adaptation.of(adapter))


async def collect(engine: EngineProcess, request: Submit) -> list[SequenceOutput]:
    return [output async for output in engine.submit(request)]


def tokens(outputs: list[SequenceOutput]) -> tuple[int, ...]:
    return tuple(token for output in outputs for token in output.token_ids)


def pid(engine: EngineProcess) -> int:
    assert engine._connection is not None
    return engine._connection.process.pid


def statuses(engine: EngineProcess) -> asyncio.Queue[EngineStatus]:
    """Every change of status from now on."""
    seen: asyncio.Queue[EngineStatus] = asyncio.Queue()
    engine.on_status(seen.put_nowait)
    return seen


async def test_the_configuration_reaches_the_engine_and_its_answers_come_back() -> None:
    async with running(max_num_seqs=7) as engine:
        assert engine.status == "ready"
        assert engine.ready is not None
        assert engine.ready.adapter_pages_total == 7
        answers = await asyncio.gather(*(collect(engine, submit(str(i), 5 + i)) for i in range(20)))
        for place, outputs in enumerate(answers):
            assert tokens(outputs) == expected(PROMPT, None, 5 + place)
    assert engine.status == "stopped"


async def test_steps_are_told() -> None:
    async with running() as engine:
        steps: list[StepOutputs] = []
        engine.on_step(steps.append)
        await collect(engine, submit())
        assert sum(step.iteration_tokens for step in steps) == 3 + 5


async def test_a_prompt_of_megabytes_crosses() -> None:
    async with running() as engine:
        outputs = await collect(engine, submit(prompt=(1,) * (1 << 21)))
        assert outputs[-1].finish_reason == "error"
        assert "2097152 tokens" in (outputs[-1].error or "")
        assert tokens(await collect(engine, submit())) == expected(PROMPT, None, 6)


async def test_what_cannot_be_encoded_harms_nobody() -> None:
    async with running() as engine:
        with pytest.raises(OverflowError):
            await collect(engine, Submit("r", PROMPT, SamplingParams(max_tokens=1, seed=1 << 64)))
        assert not engine._in_flight
        assert tokens(await collect(engine, submit())) == expected(PROMPT, None, 6)


async def test_leaving_early_aborts_and_the_stats_say_so_at_once() -> None:
    async with running("build_slow") as engine:
        steps: asyncio.Queue[StepOutputs] = asyncio.Queue()
        engine.on_step(steps.put_nowait)
        stream = engine.submit(submit(num_tokens=1900))
        await anext(stream)
        await stream.aclose()
        async with asyncio.timeout(20):
            while (await steps.get()).stats.num_running:
                pass
        assert not engine._in_flight


async def test_an_idle_engine_says_nothing() -> None:
    async with running() as engine:
        await collect(engine, submit())
        steps: list[StepOutputs] = []
        engine.on_step(steps.append)
        engine.register_adapter("v", "/v")
        engine.forget_adapter("v")
        await collect(engine, submit(num_tokens=1))
        assert [step.iteration_tokens > 0 for step in steps] == [True]


async def test_a_watcher_that_fails_harms_nobody() -> None:
    async with running() as engine:
        engine.on_step(lambda _: 1 // 0)
        for _ in range(2):
            assert tokens(await collect(engine, submit())) == expected(PROMPT, None, 6)


async def test_an_engine_that_sends_nonsense_is_started_again() -> None:
    async with running("build_garbled") as engine:
        changes = statuses(engine)
        with pytest.raises(Unavailable):
            await collect(engine, submit())
        assert [await changes.get(), await changes.get()] == ["restarting", "ready"]


async def test_a_killed_engine_fails_what_is_in_flight_and_comes_back_with_its_adapters() -> None:
    async with running("build_slow") as engine:
        engine.register_adapter("v1", "/v1", pinned=True)
        engine.register_adapter("v2", "/v2")
        engine.forget_adapter("v2")
        changes = statuses(engine)
        streams = [engine.submit(submit(str(i), 1900, "v1")) for i in range(3)]
        for stream in streams:
            await anext(stream)
        first = pid(engine)
        os.kill(first, signal.SIGKILL)
        for stream in streams:
            with pytest.raises(Unavailable, match="the engine stopped while it worked on this request"):
                async for _ in stream:
                    pass
        assert engine.status == "restarting"
        with pytest.raises(Unavailable, match="the engine is restarting"):
            await collect(engine, submit())
        engine.register_adapter("v3", "/v3")  # while there is no engine to tell
        assert [await changes.get(), await changes.get()] == ["restarting", "ready"]
        assert (engine.num_restarts, pid(engine) != first) == (1, True)
        for version in ("v1", "v3"):
            assert tokens(await collect(engine, submit(adapter=version))) == expected(PROMPT, version, 6)
        assert (await collect(engine, submit(adapter="v2")))[-1].finish_reason == "error"


def routed(gate_set: str) -> Submit:
    adaptation = Adaptation(routing=Routing(gate_set, ("v1", BASE_COLUMN), 1, 1.0))
    return Submit("routed", PROMPT, SamplingParams(max_tokens=6), adaptation)


async def test_an_engine_that_comes_back_knows_the_gate_sets() -> None:
    async with running("build_slow") as engine:
        engine.register_adapter("v1", "/v1")
        engine.register_gate_set("g1", "/g1", ("v1",), null=True)
        engine.register_gate_set("g2", None, ("v1",), null=True)
        engine.forget_gate_set("g2")
        assert tokens(await collect(engine, routed("g1")))
        changes = statuses(engine)
        os.kill(pid(engine), signal.SIGKILL)
        assert [await changes.get(), await changes.get()] == ["restarting", "ready"]
        assert tokens(await collect(engine, routed("g1"))) == expected(PROMPT, routed("g1").adaptation.key, 6)
        assert (await collect(engine, routed("g2")))[-1].finish_reason == "error"


async def test_restarts_are_counted_before_the_status_is_told() -> None:
    async with running() as engine:
        counted: asyncio.Queue[tuple[EngineStatus, int]] = asyncio.Queue()
        engine.on_status(lambda status: counted.put_nowait((status, engine.num_restarts)))
        os.kill(pid(engine), signal.SIGKILL)
        assert [await counted.get(), await counted.get()] == [("restarting", 0), ("ready", 1)]


async def test_an_engine_that_dies_again_while_it_starts_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_client, "FIRST_BACKOFF_S", 0.01)
    waits: asyncio.Queue[float] = asyncio.Queue()
    switch = tmp_path / "start"
    switch.touch()
    async with running("build_once", model=str(switch)) as engine:
        changes = statuses(engine)
        switch.unlink()
        launch = engine._launch

        async def launched() -> object:
            waits.put_nowait(0)
            return await launch()

        monkeypatch.setattr(engine, "_launch", launched)
        os.kill(pid(engine), signal.SIGKILL)
        for _ in range(3):
            await waits.get()
        assert engine.status == "restarting"
        switch.touch()
        assert [await changes.get(), await changes.get()] == ["restarting", "ready"]
        assert engine.num_restarts == 1


@pytest.mark.parametrize("trouble", [OSError(24, "Too many open files"), msgspec.DecodeError("no message")])
async def test_what_keeps_an_engine_from_starting_again_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, trouble: Exception
) -> None:
    async with running() as engine:
        changes = statuses(engine)
        launch, troubles = engine._launch, [trouble]

        async def launched() -> object:
            if troubles:
                raise troubles.pop()
            return await launch()

        monkeypatch.setattr(engine, "_launch", launched)
        os.kill(pid(engine), signal.SIGKILL)
        async with asyncio.timeout(20):
            assert [await changes.get(), await changes.get()] == ["restarting", "ready"]
        assert not troubles


async def test_an_engine_that_hangs_up_as_it_starts_is_killed_and_its_socket_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "STOP_TIMEOUT_S", 0.2)
    engine = EngineProcess(EngineConfig(), entry="tests.server.ipc.engines:build_hung_up", log_level="CRITICAL")
    spawned = []
    connect = engine_client.connect

    async def noted(*arguments: object) -> object:
        spawned.append(await connect(*arguments))
        return spawned[-1]

    monkeypatch.setattr(engine_client, "connect", noted)
    with pytest.raises(Unavailable, match="while it started"):
        async with asyncio.timeout(20):
            await engine.start()
    assert spawned[0].process.returncode == -signal.SIGKILL
    assert spawned[0].writer.is_closing()
    await engine.stop()


@pytest.mark.parametrize(
    ("build", "kind", "message"),
    [
        ("build_refused", InvalidRequest, "no such model: nobody"),
        ("build_broken", InvalidRequest, "ZeroDivisionError: at start"),
        ("build_killed", Unavailable, "the engine process was ended by SIGKILL while it started"),
        ("nothing_of_that_name", Unavailable, "the engine process ended with status 1 while it started"),
    ],
)
async def test_an_engine_that_cannot_start_is_an_error_and_no_loop(
    build: str, kind: type[Exception], message: str
) -> None:
    engine = EngineProcess(
        EngineConfig(model="nobody"), entry=f"tests.server.ipc.engines:{build}", log_level="CRITICAL"
    )
    with pytest.raises(kind, match=message):
        await engine.start()
    assert engine.status == "failed"
    assert engine._supervisor is None
    await engine.stop()


async def test_an_engine_logs_as_the_server_does(capfd: pytest.CaptureFixture[str]) -> None:
    entry = "tests.server.ipc.engines:build_broken"
    engine = EngineProcess(EngineConfig(), entry=entry, log_level="error", log_format="json")
    with pytest.raises(InvalidRequest):
        await engine.start()
    (line,) = [json.loads(line) for line in capfd.readouterr().err.splitlines() if "ZeroDivisionError" in line]
    assert (line["event"], line["level"]) == ("the engine could not start", "error")
    assert line["logger"] == "perseid_server.ipc.engine_process"


async def test_sigterm_is_the_parents_business() -> None:
    """The terminal and systemd signal the whole group; requests in flight must live through the grace time."""
    async with running("build_slow") as engine:
        stream = engine.submit(submit(num_tokens=300))
        outputs = [await anext(stream)]
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(pid(engine), number)
        outputs += [output async for output in stream]
        assert tokens(outputs) == expected(PROMPT, None, 300)


async def test_stopping_fails_what_is_in_flight_and_ends_the_process() -> None:
    async with running("build_slow") as engine:
        stream = engine.submit(submit(num_tokens=1900))
        await anext(stream)
        process = engine._connection.process
        await engine.stop()
        with pytest.raises(Unavailable, match="the server is shutting down"):
            async for _ in stream:
                pass
        assert process.returncode == 0
        with pytest.raises(Unavailable, match="the engine is stopped"):
            await collect(engine, submit())


@pytest.mark.parametrize("unread", [1, 1 << 21], ids=["pipe with room", "full pipe"])
async def test_a_hung_engine_is_killed_at_stop(monkeypatch: pytest.MonkeyPatch, unread: int) -> None:
    monkeypatch.setattr(connection, "STOP_TIMEOUT_S", 0.2)
    async with running() as engine:
        process = engine._connection.process
        os.kill(process.pid, signal.SIGSTOP)
        waiting = asyncio.create_task(collect(engine, submit(prompt=(1,) * unread)))
        await asyncio.sleep(0)
        assert engine._in_flight
        async with asyncio.timeout(20):
            await engine.stop()
        assert process.returncode == -signal.SIGKILL
        with pytest.raises(Unavailable):
            await waiting


async def test_an_engine_ends_with_its_parent() -> None:
    """A parent that is killed sends nothing; its end of the socket closes."""
    async with running("build_slow") as engine:
        process = engine._connection.process
        engine._supervisor.cancel()
        engine._connection.writer.transport.abort()
        async with asyncio.timeout(20):
            assert await process.wait() == 0


def test_sending_to_an_engine_that_is_gone_is_harmless() -> None:
    """On uvloop, which serves, a closed transport raises; the supervisor must live to start another engine."""

    async def send_after_the_end() -> None:
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        gone = Connection(Mock(), reader, writer, Mock())
        theirs.close()
        writer.transport.abort()
        with pytest.raises(EngineGone):
            await gone.receive()
        gone.send(Shutdown())

    uvloop.run(send_after_the_end())

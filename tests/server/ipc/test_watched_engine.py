"""An engine that hangs, is stopped, or dies of a request: it is found, ended, told of, and there is another."""

import asyncio
import gc
import logging
import os
import signal
from pathlib import Path

import pytest

from perseid_server.errors import Unavailable
from perseid_server.ipc import endings, engine_client, suspects
from perseid_server.ipc.endings import Ending
from perseid_server.ipc.engine_client import EngineProcess
from tests.fakes import expected
from tests.server.ipc.engines import ABORT, HANG, POISON
from tests.server.ipc.test_engine_client import PROMPT, collect, pid, repository_is_importable, running, submit, tokens

__all__ = ["repository_is_importable"]

STEP_TIMEOUT_S = 0.5


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(engine_client, "LONGEST_BACKOFF_S", 0.02)


def ends(engine: EngineProcess) -> asyncio.Queue[Ending]:
    seen: asyncio.Queue[Ending] = asyncio.Queue()
    engine.on_ending(seen.put_nowait)
    return seen


async def ready_again(engine: EngineProcess, restarts: int) -> None:
    async with asyncio.timeout(30):
        while engine.num_restarts < restarts or engine.status != "ready":  # noqa: ASYNC110  either may come last
            await asyncio.sleep(0.005)


async def fails(engine: EngineProcess, first_token: int, name: str = "r", adapter: str | None = None) -> Unavailable:
    with pytest.raises(Unavailable) as caught:
        async with asyncio.timeout(30):
            await collect(engine, submit(name, prompt=(first_token, 2), adapter=adapter))
    return caught.value


async def test_a_step_that_hangs_ends_the_engine_and_the_log_says_where(caplog: pytest.LogCaptureFixture) -> None:
    async with running("build_poisoned", step_timeout_s=STEP_TIMEOUT_S) as engine:
        engine.register_adapter("v1", "/v1")
        endings_seen = ends(engine)
        assert engine.step_age_s() is None
        error = await fails(engine, HANG, "guilty", "v1")
        assert error.retry_after_s >= 1.0
        await ready_again(engine, 1)
        assert (await endings_seen.get()).cause == "stuck"
        assert "did not come to an end with a step for 0.5 s" in caplog.text
        assert "requests guilty, with the adapters v1" in caplog.text
        assert "engines.py" in caplog.text, "the stack of the thread that hangs"
        assert tokens(await collect(engine, submit())) == expected(PROMPT, None, 6)


async def test_the_age_of_a_step_is_told_while_it_runs() -> None:
    async with running("build_poisoned") as engine:
        task = asyncio.create_task(collect(engine, submit(prompt=(HANG, 1))))
        async with asyncio.timeout(20):
            while not engine.step_age_s():  # noqa: ASYNC110  it is another process that moves
                await asyncio.sleep(0.005)
            earlier = engine.step_age_s()
            while engine.step_age_s() <= earlier:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        await engine.stop()
        assert engine.step_age_s() is None
        with pytest.raises(Unavailable):
            await task


async def test_a_kernel_that_is_compiled_in_a_step_is_no_hang_and_what_hangs_after_it_is(tmp_path: Path) -> None:
    compiled = tmp_path / "compiled"
    async with running("build_compiling", step_timeout_s=STEP_TIMEOUT_S, model=str(compiled)) as engine:
        endings_seen = ends(engine)
        task = asyncio.create_task(collect(engine, submit()))
        async with asyncio.timeout(60):
            while (engine.step_age_s() or 0.0) < 3 * STEP_TIMEOUT_S:  # noqa: ASYNC110  it is another process that moves
                await asyncio.sleep(0.005)
        assert (engine.num_restarts, engine.status) == (0, "ready")
        compiled.touch()
        assert tokens(await task) == expected(PROMPT, None, 6)
        await fails(engine, HANG)
        ending = await endings_seen.get()
        assert (ending.cause, ending.text) == ("stuck", "did not come to an end with a step for 0.5 s")


async def test_what_crashes_as_it_starts_leaves_its_stacks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Unavailable, match="was ended by SIGABRT while it started"):
        async with running("build_aborted"):
            pass
    assert "in build_aborted" in caplog.text
    switch = tmp_path / "start"
    switch.touch()
    async with running("build_aborted_later", model=str(switch)) as engine:
        caplog.clear()
        endings_seen = ends(engine)
        switch.unlink()
        os.kill(pid(engine), signal.SIGKILL)
        assert (await endings_seen.get()).text == "was ended by SIGKILL"
        assert "the engine's stacks" not in caplog.text
        assert (await endings_seen.get()).text == "was ended by SIGABRT"
        assert engine.trouble == "was ended by SIGABRT"
        assert "in build_aborted" in caplog.text
        switch.touch()
        await ready_again(engine, 1)
        assert engine.trouble == ""


@pytest.mark.parametrize("busy", [False, True])
async def test_an_engine_that_was_stopped_is_replaced_though_nobody_asks_anything(busy: bool) -> None:
    async with running("build_slow", step_timeout_s=STEP_TIMEOUT_S) as engine:
        endings_seen = ends(engine)
        stream = engine.submit(submit(num_tokens=1900))
        if busy:
            await anext(stream)
        os.kill(pid(engine), signal.SIGSTOP)
        await ready_again(engine, 1)
        ending = await endings_seen.get()
        assert (ending.cause, ending.by_its_work) == ("stopped", False)
        if busy:
            with pytest.raises(Unavailable):
                async for _ in stream:
                    pass


async def test_a_busy_engine_and_an_idle_one_are_left_alone() -> None:
    async with running("build_slow", step_timeout_s=0.4) as engine:
        assert tokens(await collect(engine, submit(num_tokens=700))) == expected(PROMPT, None, 700)
        await asyncio.sleep(1.0)
        assert tokens(await collect(engine, submit())) == expected(PROMPT, None, 6)
        assert engine.num_restarts == 0


async def test_a_start_that_hangs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perseid_server.ipc.watchdog.PATIENCE", 2)
    with pytest.raises(Unavailable, match="did not come to an end with its start"):
        async with running("build_endless", step_timeout_s=STEP_TIMEOUT_S):
            pass


async def test_an_engine_that_says_the_wrong_thing_is_replaced() -> None:
    async with running("build_talkative") as engine:
        endings_seen = ends(engine)
        await fails(engine, 1)
        await ready_again(engine, 1)
        assert (await endings_seen.get()).cause == "protocol"


@pytest.mark.parametrize(
    ("first_token", "cause", "text"),
    [(POISON, "exit", "ended with status 3"), (ABORT, "signal", "was ended by SIGABRT")],
)
async def test_a_request_that_ends_the_engine_is_refused_after_the_third_time_and_others_are_not(
    first_token: int, cause: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with running("build_poisoned") as engine:
        endings_seen = ends(engine)
        for turn in range(suspects.MOST_CRASHES):
            await fails(engine, first_token, f"r{turn}")
            await ready_again(engine, turn + 1)
            ending = await endings_seen.get()
            assert (ending.cause, ending.text) == (cause, text)
            assert f"requests r{turn}" in caplog.text
        error = await fails(engine, first_token, "again")
        assert "was running each of the 3 times that the engine crashed" in error.message
        assert 50 < error.retry_after_s <= 60
        assert tokens(await collect(engine, submit())) == expected(PROMPT, None, 6)
        assert engine.num_restarts == suspects.MOST_CRASHES


async def test_an_adapter_whose_answers_were_taken_up_to_a_stop_text_is_no_suspect() -> None:
    async with running("build_poisoned") as engine:
        engine.register_adapter("v1", "/v1")
        for turn in range(suspects.MOST_CRASHES):
            answer = engine.submit(submit(num_tokens=1900, adapter="v1"))
            await anext(answer)
            await answer.aclose()
            await fails(engine, POISON, adapter="v1")
            await ready_again(engine, turn + 1)
        assert tokens(await collect(engine, submit(adapter="v1"))) == expected(PROMPT, "v1", 6)


async def test_who_is_cut_off_is_told_when_the_next_engine_may_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perseid_server.ipc.engine_client.FIRST_BACKOFF_S", 40.0)
    async with running("build_poisoned") as engine:
        assert 39 < (await fails(engine, POISON)).retry_after_s < 60


async def test_a_kill_for_want_of_memory_is_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    events = tmp_path / "memory.events"
    events.write_text("low 0\noom 3\noom_kill 2\n")
    monkeypatch.setattr(endings, "_memory_events", lambda: [events])
    async with running("build_slow") as engine:
        endings_seen = ends(engine)
        os.kill(pid(engine), signal.SIGKILL)
        assert (await endings_seen.get()).cause == "signal"
        await ready_again(engine, 1)
        events.write_text("low 0\noom 4\noom_kill 3\n")
        os.kill(pid(engine), signal.SIGKILL)
        assert (await endings_seen.get()).cause == "out_of_memory"


def test_the_systems_own_count_of_such_kills_is_read() -> None:
    assert endings.num_oom_kills() >= 0


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


@pytest.mark.parametrize("num_restarts", [6, pytest.param(50, marks=pytest.mark.chaos)])
async def test_restarts_leave_no_process_and_no_descriptor(num_restarts: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    async with running("build_slow") as engine:
        for restarts in range(1, num_restarts + 1):
            os.kill(pid(engine), signal.SIGKILL)
            await ready_again(engine, restarts)
            if restarts == 2:
                gc.collect()
                descriptors, processes = num_descriptors(), len(children())
        gc.collect()
        assert num_descriptors() == descriptors
        assert len(children()) == processes

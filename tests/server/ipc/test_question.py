"""What an engine has at hand, asked over its socket: also while it runs, hangs, dies."""

import asyncio
import os
import signal
from dataclasses import replace

import pytest

from perseid_server.engine.messages import DescribeState
from perseid_server.engine.state import EngineState
from perseid_server.ipc.engine_client import EngineProcess
from perseid_server.ipc.question import StateQuestion
from tests.server.ipc.engines import HANG
from tests.server.ipc.test_engine_client import (  # noqa: F401  a fixture of the module
    collect,
    pid,
    repository_is_importable,
    running,
    statuses,
    submit,
)

LONG_S = 60.0
STATE = EngineState(0, 0, (), (), 0, 0, (), 0, 0, 0, 0, 0, 0)


def hangs(engine: EngineProcess, request_id: str) -> bool:
    """Whether its step runs this request."""
    assert engine._connection is not None
    return request_id in engine._connection.vitals.pulse.running_now().request_ids


async def test_an_idle_engine_answers_and_so_does_one_that_runs() -> None:
    async with running("build_slow") as engine:
        told = await engine.describe(5, LONG_S)
        assert told is not None
        assert (told.num_running, told.kv_blocks_used) == (0, 0)
        outputs = engine.submit(submit("r", 1000))
        await anext(outputs)
        told = await engine.describe(5, LONG_S)
        assert told is not None
        assert [(one.request_id, one.stage) for one in told.sequences] == [("r", "decode")]
        await outputs.aclose()


async def test_an_engine_that_hangs_is_not_waited_for() -> None:
    async with running("build_poisoned") as engine:
        hanging = asyncio.create_task(collect(engine, submit("h", prompt=(HANG,))))
        while not hangs(engine, "h"):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert await engine.describe(5, 0.05) is None
        assert await engine.describe(5, 0.05) is None
        waiting = asyncio.create_task(engine.describe(5, LONG_S))
        await asyncio.sleep(0)
        changes = statuses(engine)
        os.kill(pid(engine), signal.SIGKILL)
        assert await waiting is None  # long before its time is over
        await asyncio.gather(hanging, return_exceptions=True)
        while (status := await changes.get()) != "ready":
            assert await engine.describe(5, LONG_S) is None, status
        assert await engine.describe(5, LONG_S) is not None


async def test_one_question_is_under_way_at_a_time() -> None:
    question, sent = StateQuestion(), []
    asked = [asyncio.create_task(question.ask(sent.append, 7, LONG_S)) for _ in range(3)]
    await asyncio.sleep(0)
    assert sent == [DescribeState(7)]
    asked[0].cancel()
    question.answered(STATE)
    assert [await one for one in asked[1:]] == [STATE, STATE]
    question.answered(STATE)  # nobody has asked for that
    last = asyncio.create_task(question.ask(sent.append, 8, LONG_S))
    await asyncio.sleep(0)
    assert sent[1:] == [DescribeState(8)]
    question.answered(None)
    assert await last is None
    with pytest.raises(asyncio.CancelledError):
        await asked[0]


async def test_who_asks_for_another_length_of_lists_gets_an_answer_of_that_length() -> None:
    question, sent = StateQuestion(), []
    asked = [asyncio.create_task(question.ask(sent.append, limit, LONG_S)) for limit in (1, 2, 1)]
    await asyncio.sleep(0)
    assert sent == [DescribeState(1), DescribeState(2)]
    longer = replace(STATE, num_running=2)
    for state in (STATE, longer, STATE):  # in the order of the questions; nobody has asked for the last
        question.answered(state)
    assert await asyncio.gather(*asked) == [STATE, longer, STATE]
    asked = [asyncio.create_task(question.ask(sent.append, limit, LONG_S)) for limit in (1, 2)]
    await asyncio.sleep(0)
    question.answered(None)
    assert await asyncio.gather(*asked) == [None, None]

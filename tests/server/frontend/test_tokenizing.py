"""Long texts: few at once, few characters waiting, short ones not behind long ones."""

import asyncio
import threading

import pytest

from perseid_server.access.caller import ANYONE, Caller
from perseid_server.errors import QueueFull
from perseid_server.frontend.tokenizing import Tokenizing


async def settled(tokenizing: Tokenizing) -> None:
    async with asyncio.timeout(20):
        while tokenizing.characters:  # noqa: ASYNC110  it has no event for it
            await asyncio.sleep(0.001)


async def test_a_thousand_huge_prompts_are_few_threads_and_few_characters() -> None:
    tokenizing, go_on = Tokenizing(max_characters=10_000_000), threading.Event()
    before = set(threading.enumerate())
    asked = [asyncio.create_task(tokenizing.run(ANYONE, 1_000_000, lambda: go_on.wait(20))) for _ in range(1000)]
    done, waiting = await asyncio.wait(asked, timeout=0.1)
    assert (len(done), len(waiting)) == (990, 10)
    assert all(isinstance(task.exception(), QueueFull) for task in done)
    assert tokenizing.characters == 10_000_000
    assert len(set(threading.enumerate()) - before) == 1
    short = await tokenizing.run(Caller("other"), 0, lambda: "short")
    assert short == "short"
    go_on.set()
    assert all(await asyncio.gather(*waiting))
    await settled(tokenizing)
    tokenizing.close()


async def test_who_leaves_is_not_tokenized_for() -> None:
    tokenizing, go_on, ran = Tokenizing(), threading.Event(), []
    first = asyncio.create_task(tokenizing.run(ANYONE, 100_000, lambda: go_on.wait(20)))
    second = asyncio.create_task(tokenizing.run(ANYONE, 100_000, lambda: ran.append(1)))
    await asyncio.sleep(0.01)
    second.cancel()
    await asyncio.wait([second])
    go_on.set()
    await first
    await settled(tokenizing)
    assert not ran
    tokenizing.close()


async def test_a_tenants_flood_leaves_room_for_others() -> None:
    tokenizing, go_on = Tokenizing(max_characters=100), threading.Event()
    flood = [asyncio.create_task(tokenizing.run(Caller("flood"), 10, go_on.wait)) for _ in range(20)]
    await asyncio.sleep(0.01)
    other = asyncio.create_task(tokenizing.run(Caller("other"), 10, go_on.wait))
    await asyncio.sleep(0.01)
    assert not other.done()
    go_on.set()
    assert await other
    assert sum(isinstance(one, QueueFull) for one in await asyncio.gather(*flood, return_exceptions=True)) == 12
    tokenizing.close()


async def test_what_goes_wrong_is_told() -> None:
    tokenizing = Tokenizing()
    with pytest.raises(ZeroDivisionError):
        await tokenizing.run(ANYONE, 10, lambda: 1 // 0)
    await settled(tokenizing)

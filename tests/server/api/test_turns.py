"""Lines that are let in by turns."""

import asyncio
import contextlib

from perseid_server.api.grpc.turns import Turns
from tests.server.stack import settle


class Crowd:
    """Tasks that go in and stay until told."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.inside: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._leave: dict[str, asyncio.Event] = {}

    async def come(self, *names: str) -> None:
        """`a1` stands in line `a`."""
        for name in names:
            self._leave[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._stay(name))
        await settle()

    async def leave(self, name: str) -> None:
        self._leave[name].set()
        await self.tasks[name]
        await settle()

    async def _stay(self, name: str) -> None:
        async with self.turns.turn(name[0]):
            self.inside.append(name)
            await self._leave[name].wait()
        self.inside.remove(name)


async def test_lines_take_turns_and_each_keeps_its_order() -> None:
    crowd = Crowd(Turns(1))
    await crowd.come("a1", "a2", "a3", "a4", "b1", "b2", "c1")
    seen = []
    while crowd.inside:
        (name,) = crowd.inside
        seen.append(name)
        await crowd.leave(name)
    assert seen == ["a1", "a2", "b1", "c1", "a3", "b2", "a4"]
    assert (crowd.turns.num_free, crowd.turns.num_waiting) == (1, 0)


async def test_no_more_are_inside_than_may_be() -> None:
    crowd = Crowd(Turns(2))
    await crowd.come("a1", "b1", "c1", "d1")
    assert (crowd.inside, crowd.turns.num_waiting, crowd.turns.num_free) == (["a1", "b1"], 2, 0)
    await crowd.leave("b1")
    assert crowd.inside == ["a1", "c1"]


async def test_who_leaves_the_line_is_passed_over() -> None:
    crowd = Crowd(Turns(1))
    await crowd.come("a1", "a2", "b1")
    crowd.tasks["a2"].cancel()
    await settle()
    assert crowd.turns.num_waiting == 1
    await crowd.leave("a1")
    assert crowd.inside == ["b1"]
    await crowd.leave("b1")
    assert crowd.turns.num_free == 1


async def test_who_is_let_in_and_leaves_at_the_same_moment_gives_the_place_on() -> None:
    turns = Turns(1)
    crowd = Crowd(turns)
    async with turns.turn("x"):
        await crowd.come("a1", "b1")
    crowd.tasks["a1"].cancel()  # its place is given, and it has not run since
    with contextlib.suppress(asyncio.CancelledError):
        await crowd.tasks["a1"]
    await settle()
    assert crowd.inside == ["b1"]
    await crowd.leave("b1")
    assert turns.num_free == 1

"""Loads from the hub: on whose behalf, and what they leave to others. The real huggingface_hub over a hub that is
none."""

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from perseid_server.access.caller import Caller, calling
from perseid_server.errors import NotFound, TooLarge, Unavailable
from perseid_server.frontend import fetching
from tests.fake_hub import FakeHub, fake_hub
from tests.server.stack import Stack, write_adapter

TENANT = Caller("b", adapters=("b-*",))
MANY = 40  # more than asyncio has threads for


@pytest.fixture
def hub(stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    stack.registry._policy = replace(stack.registry._policy, allow_hub=True)
    with fake_hub(tmp_path / "cache", monkeypatch) as hub:
        hub.add("org/open", write_adapter(tmp_path / "open", seed=1))
        hub.add("org/private", write_adapter(tmp_path / "private", seed=2), private=True)
        yield hub


@pytest.fixture
def held(hub: FakeHub) -> Iterator[threading.Event]:
    """The hub answers when this is set."""
    go_on = threading.Event()
    hub.before = lambda _: go_on.wait(30)
    yield go_on
    go_on.set()


def left_in_tmp(stack: Stack) -> list[Path]:
    return list((stack.root.parent / "store" / "tmp").iterdir())


async def test_what_the_operator_loaded_is_not_everybodys(stack: Stack, hub: FakeHub) -> None:
    await stack.registry.load("mine", "org/private")
    commit = hub.repositories["org/private"].commit
    with calling(TENANT):
        for source in ("org/private", f"org/private@{commit}"):
            with pytest.raises(NotFound, match="does not show it"):
                await stack.registry.load("b-x", source)
        await stack.registry.load("b-open", "org/open")
    assert stack.registry.get("b-open").info.rank == 2
    assert left_in_tmp(stack) == []


async def test_what_is_refused_leaves_nothing(stack: Stack, hub: FakeHub) -> None:
    hub.repositories["org/open"].stated = {"adapter_model.safetensors": 1 << 40}
    with calling(TENANT), pytest.raises(TooLarge):
        await stack.registry.load("b-open", "org/open")
    assert left_in_tmp(stack) == []


async def test_a_slow_hub_holds_up_nothing_else(stack: Stack, held: threading.Event) -> None:
    await stack.load("one")
    slow = [asyncio.create_task(stack.registry.load(f"hub-{number}", "org/open")) for number in range(MANY)]
    async with asyncio.timeout(20):
        await stack.load("two", seed=3)
        await stack.registry.pin("two", pinned=True)
        await stack.registry.unload("one")
        assert not any(task.done() for task in slow)
        held.set()
        await asyncio.gather(*slow)
    assert len(stack.registry.list()) == MANY + 1


async def test_a_download_that_takes_too_long_is_given_up(
    stack: Stack, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "LONGEST_DOWNLOAD_S", 0.05)
    with calling(TENANT), pytest.raises(Unavailable, match="given up"):
        await stack.registry.load("b-open", "org/open")
    assert len(left_in_tmp(stack)) == 1, "its thread still writes there"
    held.set()
    async with asyncio.timeout(20):
        while left_in_tmp(stack):  # noqa: ASYNC110
            await asyncio.sleep(0.005)

"""A server that shuts down makes the changes that have begun, within the grace time, and begins no others."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

from perseid_server.adapters.intake import Intake
from perseid_server.errors import Unavailable
from tests.server.stack import Stack, settle, write_adapter


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Loads wait for this event, on their thread; it is set at the end at the latest."""
    event, take = threading.Event(), Intake.take

    def waiting(intake: Intake, *args: object) -> object:
        event.wait(60)
        return take(intake, *args)

    monkeypatch.setattr(Intake, "take", waiting)
    yield event
    event.set()


def rejected_draining(stack: Stack) -> float | None:
    return stack.metrics.registry.get_sample_value("perseid_requests_rejected_total", {"reason": "draining"})


async def test_what_has_begun_is_made_and_nothing_else(stack: Stack, held: threading.Event) -> None:
    held.set()
    await stack.load("old")
    held.clear()
    load = asyncio.create_task(stack.load("one"))
    await settle()
    draining = asyncio.create_task(stack.registry.drain(60))
    await settle()
    new = str(write_adapter(stack.root / "new"))
    for change in (
        stack.registry.load("new", new),
        stack.registry.unload("old"),
        stack.registry.pin("old", pinned=True),
    ):
        with pytest.raises(Unavailable, match="the server is shutting down") as refused:
            await change
        assert refused.value.retry_after_s == 5.0
    assert not draining.done()
    held.set()
    await draining
    assert load.done(), "it is waited for"
    assert {adapter.name for adapter in stack.registry.list()} == {"old", "one"}
    assert rejected_draining(stack) == 3


async def test_a_disk_that_hangs_is_not_waited_for_beyond_the_grace(stack: Stack, held: threading.Event) -> None:
    load = asyncio.create_task(stack.load("one"))
    await settle()
    async with asyncio.timeout(30):
        await stack.registry.drain(0.01)
    assert not load.done()
    held.set()
    await load


async def test_nothing_to_wait_for(stack: Stack) -> None:
    await stack.registry.drain(60)

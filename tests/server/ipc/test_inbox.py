"""What nobody reads is bounded, and ends with a word."""

import pytest

from perseid_server.engine.messages import SequenceOutput
from perseid_server.errors import QueueFull, Unavailable
from perseid_server.ipc.inbox import MAX_UNREAD, Inbox


async def test_outputs_come_in_order() -> None:
    inbox = Inbox()
    assert all(inbox.put(SequenceOutput("r", (token,))) for token in range(5))
    assert [(await inbox.get()).token_ids for _ in range(5)] == [(token,) for token in range(5)]


async def test_what_is_unread_is_dropped_when_it_is_too_much() -> None:
    inbox = Inbox()
    assert all(inbox.put(SequenceOutput("r")) for _ in range(MAX_UNREAD))
    assert not inbox.put(SequenceOutput("r"))
    assert inbox.put(SequenceOutput("r"))  # ended: nothing is kept, and nobody is told again
    inbox.fail(Unavailable("gone"))
    assert inbox._outputs.qsize() == 1
    with pytest.raises(QueueFull, match="reads too slowly"):
        await inbox.get()


async def test_the_engines_end_is_told_after_what_came_before() -> None:
    inbox = Inbox()
    inbox.put(SequenceOutput("r"))
    inbox.fail(Unavailable("gone"))
    await inbox.get()
    with pytest.raises(Unavailable, match="gone"):
        await inbox.get()

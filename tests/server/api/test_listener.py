"""Accepting connections where the system has nothing left for them, and none after the end."""

import asyncio
import errno
import os
import socket

import pytest

from perseid_server.api.http import listener as module
from perseid_server.api.http.listener import Listener
from tests.server.stack import until


class Short(socket.socket):
    """A listening socket without descriptors for the next `failures` connections."""

    failures = 0

    def accept(self):
        if self.failures:
            type(self).failures -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


class Greeting(asyncio.Protocol):
    """Says hello."""

    def __init__(self, on_made) -> None:
        self._on_made = on_made

    def connection_made(self, transport) -> None:
        self._on_made(self)
        transport.write(b"hello")
        transport.close()


@pytest.fixture
def listening():
    with Short() as made:
        made.bind(("127.0.0.1", 0))
        made.listen()
        yield made


def listener_of(listening: socket.socket) -> Listener:
    return Listener(listening, Greeting, (), context=lambda: None)


async def greeted(address: tuple[str, int]) -> bytes:
    reader, writer = await asyncio.open_connection(*address)
    try:
        return await reader.read()
    finally:
        writer.close()


async def test_it_accepts_again_when_there_are_descriptors(
    listening: Short, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_RETRY_S", 0.001)
    monkeypatch.setattr(Short, "failures", 3)
    listener = listener_of(listening)
    listener.start()
    for _ in range(2):
        assert await greeted(listening.getsockname()) == b"hello"
    assert [record.getMessage() for record in caplog.records] == ["connections cannot be accepted: Too many open files"]
    monkeypatch.setattr(Short, "failures", 1)
    assert await greeted(listening.getsockname()) == b"hello"
    assert len(caplog.records) == 2  # a second time is told as the first was
    assert listener.handshakes == 0
    listener.stop()


async def test_nobody_is_accepted_after_the_end(listening: Short, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RETRY_S", 3600)
    monkeypatch.setattr(Short, "failures", 1)
    address = listening.getsockname()
    listener = listener_of(listening)
    listener.start()
    waiting = asyncio.create_task(greeted(address))
    await until(lambda: not Short.failures)
    listener.stop()  # while it pauses
    with pytest.raises(ConnectionError):
        await waiting
    with pytest.raises(ConnectionError):
        await greeted(address)
    assert listener._retry.cancelled()


async def test_what_was_never_begun_ends_at_once(listening: Short) -> None:
    listener_of(listening).stop()
    assert listening.fileno() == -1

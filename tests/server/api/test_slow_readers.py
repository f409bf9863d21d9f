"""Clients that read slowly get the whole of a long answer, those that read nothing are ended; with and without TLS."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio
import trustme
from starlette.responses import Response

from perseid_server.api import server
from perseid_server.api.http import protocol
from perseid_server.api.http.protocol import PatientProtocol
from perseid_server.api.tls import Tls, TlsFiles
from tests.server.stack import LiveStack, Stack, serving, until

LENGTH = 2_000_000  # more than the system keeps for both
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest_asyncio.fixture(params=["plain", "tls"])
async def connections(request: pytest.FixtureRequest, stack: Stack, tmp_path) -> AsyncIterator["Connections"]:
    stack.app.add_api_route("/long", lambda: Response(b"x" * LENGTH))
    if request.param == "plain":
        async with serving(stack) as live:
            yield Connections(live, None)
        return
    authority = trustme.CA()
    made = authority.issue_cert("127.0.0.1")
    made.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    made.private_key_pem.write_to_path(tmp_path / "key.pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    async with serving(stack, Tls(TlsFiles(tmp_path / "cert.pem", tmp_path / "key.pem"))) as live:
        yield Connections(live, context)


class Connections:
    """Of clients whose system keeps little for them."""

    def __init__(self, live: LiveStack, context: ssl.SSLContext | None) -> None:
        self.live = live
        self._context = context

    async def ask(self) -> Connection:
        """For the long answer; returns when it has begun."""
        small = socket.socket()
        small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        small.setblocking(False)
        addresses = self.live.addresses
        await asyncio.get_running_loop().sock_connect(small, (addresses.host, addresses.http_port))
        name = addresses.host if self._context is not None else None
        reader, writer = await asyncio.open_connection(
            sock=small, limit=1 << 10, ssl=self._context, server_hostname=name
        )
        writer.write(b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        return reader, writer

    @property
    def only(self) -> PatientProtocol:
        """The server's side of the one connection."""
        assert self.live.api._http is not None
        [connection] = self.live.api._http.server_state.connections
        assert isinstance(connection, PatientProtocol)
        return connection


async def read_all(reader: asyncio.StreamReader, then: Callable[[], None] = lambda: None) -> int:
    """To the end of the answer, or of the connection; returns how much came. `then` is done at every 128 KiB."""
    count = done = 0
    with contextlib.suppress(ConnectionError):
        while count < LENGTH and (data := await reader.read(1 << 17)):
            count += len(data)
            if count >> 17 > done:
                done = count >> 17
                then()
    return count


async def test_who_reads_slowly_gets_the_whole_answer(connections: Connections) -> None:
    reader, writer = await connections.ask()
    connection, looks = connections.only, 0

    def look() -> None:
        nonlocal looks
        looks += 1
        connection._look_at_reading()

    assert await read_all(reader, look) == LENGTH
    assert looks > protocol._LOOKS  # more than who reads nothing has
    writer.close()


async def test_who_reads_nothing_is_cut_off(connections: Connections, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "STALL_TIMEOUT_S", 0.1)
    reader, writer = await connections.ask()
    assert connections.live.api._http is not None
    await until(lambda: not connections.live.api._http.server_state.connections)
    assert await read_all(reader) < LENGTH
    writer.transport.abort()


async def test_who_has_read_all_may_ask_again_later(connections: Connections) -> None:
    reader, writer = await connections.ask()
    assert await read_all(reader) == LENGTH
    connection = connections.only
    await until(lambda: not connection.is_leaving)
    for _ in range(2 * protocol._LOOKS):
        connection._look_at_reading()
    writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"200" in await reader.readuntil(b"\r\n\r\n")
    writer.close()


async def test_a_connection_is_not_idle_while_its_answer_leaves(connections: Connections) -> None:
    reader, writer = await connections.ask()
    connection = connections.only
    connection.timeout_keep_alive_handler()
    assert not connection.transport.is_closing()
    assert await read_all(reader) == LENGTH
    await until(lambda: not connection.is_leaving)
    connection.timeout_keep_alive_handler()
    assert connection.transport.is_closing()
    writer.close()


async def test_an_answer_that_leaves_has_the_rest_of_the_grace_time(
    connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "LAST_WORDS_S", 0.0)
    reader, writer = await connections.ask()
    api = connections.live.api

    async def stop() -> None:
        await api.drain(30)
        await api.stop()

    stopping = asyncio.create_task(stop())
    assert await read_all(reader) == LENGTH
    await stopping
    writer.close()


async def test_an_answer_nobody_reads_has_no_more_than_the_grace_time(connections: Connections) -> None:
    _, writer = await connections.ask()
    await connections.live.api.drain(0.05)
    assert connections.only.is_leaving
    await connections.live.api.drain(-1.0)
    writer.transport.abort()


async def test_nothing_is_waited_for_where_nothing_leaves(live: LiveStack) -> None:
    async with live.http() as client:
        await client.get("/health")
        await live.api.drain(1000.0)

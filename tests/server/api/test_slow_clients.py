"""Clients that take their time: they are ended after a limit, and nobody else notices."""

import asyncio
import contextlib
import json
import socket

import pytest

from perseid_server.api.http import bodies, protocol
from tests.server.stack import LiveStack


async def connect(live: LiveStack) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(live.addresses.host, live.addresses.http_port, limit=1 << 10)


def post(body: dict[str, object], length: int | None = None) -> bytes:
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {length or len(data)}"
    return head.encode() + b"\r\n\r\n" + data


async def closed(reader: asyncio.StreamReader) -> bytes:
    """What comes until the server closes."""
    async with asyncio.timeout(20):
        try:
            return await reader.read(-1)
        except ConnectionError:
            return b""


async def alive(live: LiveStack) -> None:
    async with live.http() as client:
        assert (await client.post("/v1/completions", json={"model": "tiny", "prompt": "say"})).status_code == 200


async def test_headers_that_do_not_end(live: LiveStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEADERS_TIMEOUT_S", 0.1)
    reader, writer = await connect(live)
    writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n")
    drip = asyncio.create_task(_drip(writer))
    assert await closed(reader) == b""
    drip.cancel()
    await alive(live)


async def _drip(writer: asyncio.StreamWriter) -> None:
    while not writer.is_closing():
        writer.write(b"x-more: y\r\n")
        await asyncio.sleep(0.01)


async def test_a_connection_that_says_nothing(live: LiveStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "FIRST_REQUEST_TIMEOUT_S", 0.05)
    reader, _ = await connect(live)
    assert await closed(reader) == b""


async def test_a_request_longer_than_the_time_for_headers_is_answered(
    live: LiveStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEADERS_TIMEOUT_S", 0.05)
    live.stack.engine.hold()
    async with live.http() as client:
        for _ in range(2):  # the second on the same connection
            asking = asyncio.create_task(client.post("/v1/completions", json={"model": "tiny", "prompt": "say"}))
            await asyncio.sleep(0.15)
            live.stack.engine.go_on()
            assert (await asking).status_code == 200
            live.stack.engine.hold()


async def test_a_body_that_does_not_come(live: LiveStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_TIMEOUT_S", 0.1)
    reader, writer = await connect(live)
    writer.write(post({"model": "tiny", "prompt": "say"}, length=10_000))
    answer = await closed(reader)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"the body comes too slowly" in answer


async def test_a_client_that_does_not_read_is_cut_off_and_frees_all(
    live: LiveStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "STALL_TIMEOUT_S", 0.2)
    small = socket.socket()
    small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # what the system keeps for it does not hold the answer
    small.setblocking(False)
    await asyncio.get_running_loop().sock_connect(small, (live.addresses.host, live.addresses.http_port))
    reader, writer = await asyncio.open_connection(sock=small, limit=1 << 10)
    body = {"model": "tiny", "prompt": "say", "max_tokens": 250, "n": 50, "logprobs": 20, "stream": True}
    writer.write(post(body))
    await live.stack.engine.submissions(50)
    await alive(live)
    async with asyncio.timeout(30):
        await live.stack.service._idle.wait()
    assert b"[DONE]" not in await closed(reader)
    assert live.stack.engine.engine.stats().kv_blocks_used == 0
    writer.close()


async def test_too_many_headers_are_refused_at_once(live: LiveStack) -> None:
    reader, writer = await connect(live)
    writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"x-many: 0123456789\r\n" * 10_000)
    with contextlib.suppress(ConnectionError):  # it may be closed while the rest is on its way
        assert b"HTTP/1.1 200" not in await closed(reader)
    await alive(live)


async def test_a_half_closed_client_still_gets_its_answer_or_is_freed(live: LiveStack) -> None:
    reader, writer = await connect(live)
    writer.write(post({"model": "tiny", "prompt": "say", "max_tokens": 5}))
    writer.write_eof()
    await closed(reader)
    async with asyncio.timeout(20):
        await live.stack.service._idle.wait()
    assert live.stack.engine.engine.stats().kv_blocks_used == 0

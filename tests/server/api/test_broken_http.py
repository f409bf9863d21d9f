"""Bytes that are no HTTP: an answer as every other mistake gets, or the end of the connection; nothing in the log."""

import asyncio
import json
import logging

import pytest

from tests.server.stack import LiveStack

BEGUN = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


async def said(live: LiveStack, *pieces: bytes) -> bytes:
    """All that comes back, until the server closes."""
    reader, writer = await asyncio.open_connection(live.addresses.host, live.addresses.http_port)
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
    told = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    return told


@pytest.mark.parametrize(
    "raw",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",  # without a host
        b"GET /health HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n",
        BEGUN + b"zz\r\n",
    ],
    ids=["words", "version", "host", "header", "chunk"],
)
async def test_an_error_of_the_usual_form(live: LiveStack, caplog: pytest.LogCaptureFixture, raw: bytes) -> None:
    caplog.set_level(logging.INFO)
    head, _, body = (await said(live, raw)).partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    assert lines[0].startswith(b"http/1.1 400")
    assert b"connection: close" in lines
    (request_id,) = (
        line.removeprefix(b"x-request-id: ").decode() for line in lines if line.startswith(b"x-request-id")
    )
    told = [record.fields["request_id"] for record in caplog.records if hasattr(record, "fields")]
    assert request_id in told
    assert json.loads(body)["error"]["message"] == "the request is not valid HTTP/1.1"


async def test_a_head_whose_body_breaks_off(live: LiveStack, caplog: pytest.LogCaptureFixture) -> None:
    """uvicorn tried to send a body there, and failed with a traceback."""
    raw = b"HEAD /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
    with caplog.at_level(logging.ERROR):
        head, _, body = (await said(live, raw)).partition(b"\r\n\r\n")
    assert (head[:12], body, caplog.text) == (b"HTTP/1.1 400", b"", "")


async def test_a_body_that_breaks_off_behind_its_answer(live: LiveStack, caplog: pytest.LogCaptureFixture) -> None:
    """uvicorn tried to answer twice, and failed with a traceback."""
    reader, writer = await asyncio.open_connection(live.addresses.host, live.addresses.http_port)
    with caplog.at_level(logging.ERROR):
        writer.write(BEGUN.replace(b"/v1/completions", b"/nowhere"))
        answer = await asyncio.wait_for(reader.readuntil(b"}}"), 20)
        writer.write(b"zz\r\n")
        assert await asyncio.wait_for(reader.read(), 20) == b""
    writer.close()
    assert (answer[:12], caplog.text) == (b"HTTP/1.1 404", "")


async def test_a_slash_too_many_is_not_redirected(live: LiveStack) -> None:
    """To wherever the Host header says, which the client chooses."""
    told = await said(
        live,
        b"POST /v1/completions/ HTTP/1.1\r\nHost: elsewhere\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
    )
    assert told.startswith(b"HTTP/1.1 404")
    assert b"elsewhere" not in told

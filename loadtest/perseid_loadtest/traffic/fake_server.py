"""A server that does nothing but stream, as fast as it is asked to: against it the load generator measures itself.

    python -m perseid_loadtest.traffic.fake_server [TICK_S]

Prints its port. Every TICK_S seconds each running answer gets a chunk, all at once as after an engine's step; at 0 as
soon as the sockets take it. It speaks just enough HTTP for `HttpTarget`.
"""

import asyncio
import json
import re
import sys
from typing import cast

import uvloop

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_MAX_TOKENS = re.compile(rb'"max_tokens": ?(\d+)')
_MODELS = json.dumps({"object": "list", "data": [{"id": "fake", "object": "model"}]}).encode()


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def _event(tokens: int, finish: str = "null") -> bytes:
    """As large as Perseid's."""
    return _chunk(
        b'data: {"id":"cmpl-0123456789abcdef0123456789abcdef","object":"text_completion","created":1700000000,'
        b'"model":"fake","choices":[{"index":0,"text":" word","logprobs":null,"finish_reason":%b,"stop_reason":null}],'
        b'"usage":{"prompt_tokens":64,"completion_tokens":%d,"total_tokens":%d,"prompt_tokens_details":'
        b'{"cached_tokens":0}}}\n\n' % (finish.encode(), tokens, 64 + tokens)
    )


_END = _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class Answers:
    """All that are running."""

    def __init__(self) -> None:
        self.running: set[Connection] = set()

    async def tick(self, seconds: float) -> None:
        """A chunk for each, again and again."""
        due = asyncio.get_running_loop().time()
        while True:
            for connection in list(self.running):
                connection.step()
            due += seconds
            await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))


class Connection(asyncio.Protocol):
    """One client. Requests come one after the other."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._data = b""
        self._sent = self._wanted = 0
        self._is_full = False
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client connects."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by class

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """A client leaves."""
        self._answers.running.discard(self)

    def pause_writing(self) -> None:
        """The socket is full: no more chunks for now."""
        self._is_full = True

    def resume_writing(self) -> None:
        """There is room again."""
        self._is_full = False

    def data_received(self, data: bytes) -> None:
        """Answer when a request is whole."""
        self._data += data
        head, separator, body = self._data.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if not separator or len(body) < (int(length[1]) if length else 0):
            return
        self._data = b""
        if head.startswith(b"POST /v1/completions"):
            found = _MAX_TOKENS.search(body)
            self._sent, self._wanted = 0, int(found[1]) if found else 16
            self._transport.write(_HEAD)
            self._answers.running.add(self)
        elif head.startswith(b"GET /v1/models"):
            self._transport.write(_plain(b"200 OK", _MODELS))
        else:
            self._transport.write(_plain(b"404 Not Found", b"{}"))

    def step(self) -> None:
        """One more chunk."""
        if self._is_full:
            return
        self._sent += 1
        if self._sent < self._wanted:
            self._transport.write(_event(self._sent))
        else:
            self._answers.running.discard(self)
            self._transport.write(_event(self._sent, '"length"') + _END)


def _plain(status: bytes, body: bytes) -> bytes:
    return b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


async def serve(tick_s: float) -> None:
    """Until the process is ended."""
    answers = Answers()
    server = await asyncio.get_running_loop().create_server(lambda: Connection(answers), "127.0.0.1", 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await answers.tick(tick_s)


if __name__ == "__main__":
    uvloop.run(serve(float(sys.argv[1]) if len(sys.argv) > 1 else 0.0))

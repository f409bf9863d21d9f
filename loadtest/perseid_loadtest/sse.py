"""Many streaming completions at once over HTTP, at little cost to the servers that share the machine.

While the requests run, one thread keeps what arrives and when, and nothing more; HTTP, events and JSON are read
afterwards.
"""

import json
import selectors
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import h11

from perseid_loadtest.drive import Arrival, Stream

PATIENCE_S = 300.0
_RECEIVE_BYTES = 1 << 16
_END_OF_CHUNKS = b"\r\n0\r\n\r\n"

Json = Mapping[str, Any]
Event = tuple[float, Json]


class ServerError(RuntimeError):
    """A server refused a request or broke a stream off."""


@dataclass(slots=True)
class Recording:
    """What one connection brought: pieces of bytes and when they came."""

    started: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)


def complete(url: str, bodies: Sequence[Json]) -> list[Stream]:
    """POST every body to URL/v1/completions at once. ServerError with the server's words if one is refused."""
    return [_stream(recording) for recording in record(url, "/v1/completions", bodies)]


def _stream(recording: Recording) -> Stream:
    arrivals = count_tokens(events(recording.pieces))
    if not arrivals:
        raise ServerError("the stream brought no token")
    return Stream(recording.started, arrivals)


def record(url: str, path: str, bodies: Sequence[Json]) -> list[Recording]:
    """Send every body on a connection of its own, and keep what comes until each connection ends."""
    parts = urlsplit(url)
    address = (parts.hostname or "127.0.0.1", parts.port or 80)
    requests = [_request(f"{address[0]}:{address[1]}", parts.path.rstrip("/") + path, body) for body in bodies]
    recordings: list[Recording] = []
    with selectors.DefaultSelector() as selector:
        connections = [socket.create_connection(address, timeout=PATIENCE_S) for _ in bodies]
        try:
            for connection, request in zip(connections, requests, strict=True):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                recordings.append(Recording(time.perf_counter()))
                connection.sendall(request)
                selector.register(connection, selectors.EVENT_READ, recordings[-1])
            _receive(selector)
        finally:
            for connection in connections:
                connection.close()
    return recordings


def _receive(selector: selectors.BaseSelector) -> None:
    while selector.get_map():
        ready = selector.select(PATIENCE_S)
        if not ready:
            raise ServerError(f"nothing came for {PATIENCE_S:.0f} s")
        for key, _ in ready:
            assert isinstance(key.fileobj, socket.socket)
            data = key.fileobj.recv(_RECEIVE_BYTES)
            key.data.pieces.append((time.perf_counter(), data))
            if not data or data.endswith(_END_OF_CHUNKS):  # some servers keep the connection, whatever they were told
                selector.unregister(key.fileobj)


def _request(host: str, path: str, body: Json) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data


def events(pieces: Iterable[tuple[float, bytes]]) -> Iterator[Event]:
    """The JSON events of an answer, each with the moment at which its last byte came."""
    lines = b""
    for moment, data in _body(pieces):
        *whole, lines = (lines + data).split(b"\n")
        for line in whole:
            if line.startswith(b"data:") and line[5:].strip() != b"[DONE]":
                yield moment, json.loads(line[5:])


def _body(pieces: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The body's bytes without HTTP's framing. ServerError for any status but 200."""
    reader = h11.Connection(h11.CLIENT)
    reader.send(h11.Request(method="POST", target="/", headers=[("Host", "-"), ("Content-Length", "0")]))
    reader.send(h11.EndOfMessage())
    status, refusal = 200, b""
    for moment, piece in pieces:
        reader.receive_data(piece)
        while True:
            part = reader.next_event()
            if isinstance(part, h11.Response):
                status = part.status_code
            elif isinstance(part, h11.Data):
                if status == 200:
                    yield moment, bytes(part.data)
                refusal += bytes(part.data)
            elif not isinstance(part, h11.InformationalResponse):
                break
    if status != 200:
        raise ServerError(f"HTTP {status}: {refusal.decode(errors='replace')[:500]}")


def count_tokens(told: Iterable[Event]) -> tuple[Arrival, ...]:
    """How many tokens each event brought.

    A chunk of text is not always one token: characters of several tokens are held back until they are whole. Where
    the server tells how many tokens there are so far, their difference counts; where it tells only the sum, at the
    end, all chunks with text count the same share of it; where it tells nothing, a chunk counts one.
    """
    running: list[Arrival] = []
    chunks: list[float] = []
    total = 0
    for moment, event in told:
        if "error" in event:
            raise ServerError(json.dumps(event["error"])[:500])
        has_text = any(choice.get("text") for choice in event.get("choices") or ())
        if has_text:
            chunks.append(moment)
        so_far = _tokens_so_far(event)
        if so_far is not None and so_far > total:
            running.append(Arrival(moment, so_far - total))
            total = so_far
    if len(running) > 1 or not chunks:
        return tuple(running)
    share = total / len(chunks) if total else 1.0
    return tuple(Arrival(moment, share) for moment in chunks)


def _tokens_so_far(event: Json) -> int | None:
    """vLLM and Perseid tell it in `usage`, llama-server in `timings`."""
    usage, timings = event.get("usage") or {}, event.get("timings") or {}
    count = usage.get("completion_tokens", timings.get("predicted_n"))
    return None if count is None else int(count)

"""Bytes that no HTTP library would send. Whatever comes: an answer in HTTP or a closed connection, in time, and the
next client finds the server as it was."""

import json
import socket
from collections.abc import Iterator
from random import Random

import pytest

from perseid_server.api import server
from perseid_server.api.http import bodies, protocol
from tests.fuzz.campaign import Campaign, fuzzer
from tests.fuzz.mutate import corrupt, json_bytes, mutate
from tests.fuzz.served import attacked_server, no_traceback
from tests.server.stack import LiveStack

PATIENCE_S = 60.0
MISTAKES = {400, 401, 403, 404, 405, 408, 409, 411, 413, 414, 415, 417, 426, 429, 431, 501, 503, 505}
"""What a refusal may say; 501 and 505 are of the protocol, before any of our routes."""
ROUTES = (
    "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/v1/load_lora_adapter", "/v1/models",
    "/v1/models/one", "/health", "/ready", "/metrics", "/openapi.json", "/nowhere", "//", "/v1/models/..%2f..%2fetc",
    "/%00", "/%ff%fe", "/?a=%", "*", "http://elsewhere/v1/models", "/" + "a" * 70_000,
)  # fmt: skip
BODIES = (
    {"model": "tiny", "prompt": "ab", "max_tokens": 2, "temperature": 0.5, "stop": ["x"], "logit_bias": {"97": 1}},
    {"model": "one", "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "max_tokens": 2},
    {"prompt": "ab", "return_token_strs": True},
    {"tokens": [1, 2, 3]},
    {"lora_name": "mine", "lora_path": "source", "load_inplace": True},
)
LITERALS = (
    b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
    b'{"model": "tiny", "prompt": "a", "temperature": -Infinity, "max_tokens": 1}',
    b'{"model": "tiny", "prompt": "a", "max_tokens": ' + b"9" * 20_000 + b"}",
    b'{"model": "tiny", "prompt": "a", "seed": 1e400}',
    b'{"model": "tiny", "model": "one", "prompt": "a", "prompt": "b", "max_tokens": 1}',
    b'{"model": "tiny", "prompt": "\\ud800", "max_tokens": 1}',
    b'{"model": "tiny", "prompt": "\xed\xa0\x80", "max_tokens": 1}',
    b'{"model": "tiny", "prompt": "\xff\xfe", "max_tokens": 1}',
    b"\xef\xbb\xbf" + b'{"model": "tiny", "prompt": "a", "max_tokens": 1}',
    '{"model": "tiny", "prompt": "a", "max_tokens": 1}'.encode("utf-16"),
    b"[" * 50_000,
    b'{"a":' * 50_000,
    b'{"model": "tiny", "messages": ' + b"[" * 900 + b"]" * 900 + b"}",
    b"\0" * 100,
    b"",
)
HEADERS = (
    b"Content-Encoding: gzip", b"Content-Encoding: br, gzip", b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked",
    b"Content-Length: 5", b"Content-Length: -1", b"Content-Length: 99999999999999999999", b"Content-Length: 0x10",
    b"Content-Length: 1, 1", b"Content-Length:", b"Expect: 100-continue", b"Expect: nonsense", b"Connection: close",
    b"Connection: upgrade", b"Upgrade: websocket", b"Upgrade: h2c", b"Host: other", b"Host:", b"Accept: \xff\xfe",
    b"X-Request-Id: " + b"i" * 5000, b"X-Request-Id: a\tb", b"Authorization: Bearer " + b"\xff" * 40, b"X-Api-Key: ",
    b"Content-Type: application/json; charset=utf-16", b"Content-Type: multipart/form-data; boundary=",
    b"Content-Type: ;",
    b"no colon", b" folded: yes", b": no name", b"Na\0me: x", b"Name: a\0b", b"Name : x", b"Range: bytes=0-",
    b"X-Http-Method-Override: DELETE", b'Forwarded: for=""', b"Cookie: " + b"c=1; " * 1000,
)  # fmt: skip


LAST = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
"""Behind everything, so that a connection that is still good ends."""


@pytest.fixture(scope="module", autouse=True)
def little_patience() -> Iterator[None]:
    """Who promises more than comes is waited for, but not for as long as outside of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bodies, "BODY_TIMEOUT_S", 0.2)
        patch.setattr(protocol, "HEADERS_TIMEOUT_S", 0.2)
        patch.setattr(server, "KEEP_ALIVE_S", 0.2)
        yield


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveStack]:
    with attacked_server(tmp_path_factory.mktemp("server")) as live:
        yield live


def request(random: Random) -> bytes:
    """One request, as broken as chance wants it."""
    path = random.choice(ROUTES).encode()
    method = random.choice(
        (b"POST", b"POST", b"POST", b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"TRACE", b"FOO", b"")
    )
    version = random.choices(
        (b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9.9", b"HTP/1.1", b""), (20, 3, 1, 1, 1, 1)
    )[0]
    content = body(random)
    headers = [
        b"Host: x",
        b"Content-Type: application/json",
        *random.sample(HEADERS, random.choice((0, 0, 0, 0, 1, 2))),
    ]
    if random.random() < 0.02:
        headers += [b"X-%d: y" % place for place in range(random.choice((100, 2000, 20_000)))]
    if random.random() < 0.02:
        headers.append(b"X-Bomb: " + b"b" * random.choice((8_000, 70_000, 2_000_000)))
    if random.random() < 0.15:
        headers.append(b"Transfer-Encoding: chunked")
        content = chunked(random, content)
    elif random.random() < 0.9:
        headers.append(b"Content-Length: %d" % (len(content) + random.choices((0, -1, 1, 50), (20, 1, 1, 1))[0]))
    line_end = random.choices((b"\r\n", b"\n", b"\r"), (30, 1, 1))[0]
    head = line_end.join([b" ".join((method, path, version)), *headers, b"", b""])
    raw = head + content
    return corrupt(random, raw, len(head)) if random.random() < 0.12 else raw


def body(random: Random) -> bytes:
    """JSON, more or less."""
    match random.randrange(4):
        case 0:
            return random.choice(LITERALS)
        case 1:
            return json.dumps(random.choice(BODIES)).encode()
        case 2:
            return corrupt(random, json.dumps(random.choice(BODIES)).encode())
        case _:
            return json_bytes(random, mutate(random, random.choice(BODIES)))


def chunked(random: Random, content: bytes) -> bytes:
    """In chunks, some of them lies."""
    size = random.choice((1, 7, 1000))
    chunks = [content[place : place + size] for place in range(0, min(len(content), 50 * size), size)]
    raw = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    lies = (
        b"",
        b"",
        b"",
        b"-1\r\n",
        b"ffffffffffffffff\r\nx",
        b"zz\r\n",
        b'5;ext="\0"\r\nabc\r\n',
        b"\r\n\r\n",
        b"1" * 50,
    )
    lie = random.choice(lies)
    return lie + raw if random.random() < 0.5 else raw[: len(raw) // 2] + lie + raw[len(raw) // 2 :] if lie else raw


def answers(live: LiveStack, pieces: list[bytes], *, leaves: bool) -> bytes:
    """All that comes back until the server closes. A client that leaves says that it has said all."""
    received = bytearray()
    with socket.create_connection((live.addresses.host, live.addresses.http_port), PATIENCE_S) as client:
        try:
            for piece in pieces:
                client.sendall(piece)
            if leaves:
                client.shutdown(socket.SHUT_WR)
            while piece := client.recv(1 << 16):
                received += piece
        except TimeoutError:
            raise AssertionError(f"neither an answer nor an end, after {bytes(received[-200:])!r}") from None
        except OSError:
            pass  # closed while there was more to say
    return bytes(received)


def check_answers(raw: bytes) -> None:
    """What came back is HTTP, says whose mistake it was, and nothing else."""
    no_traceback(raw.decode("latin-1"))
    if not raw:
        return
    assert raw.startswith(b"HTTP/1.1 "), raw[:200]
    status = int(raw[9:12])
    assert status < 400 or status in MISTAKES, raw[:500]


@fuzzer(short=150, long=3000)
def test_http_bytes(campaign: Campaign, live: LiveStack) -> None:
    """One to three requests on a connection, at once or in pieces; the client that is gone before its answer is one."""

    def check(random: Random) -> None:
        raw = b"".join(request(random) for _ in range(random.choices((1, 2, 3), (8, 1, 1))[0]))
        cut = random.randrange(len(raw) + 1)
        pieces = [raw] if random.random() < 0.7 else [raw[:cut], raw[cut:]]
        check_answers(answers(live, [*pieces, LAST], leaves=random.random() < 0.1))

    campaign.run(check)

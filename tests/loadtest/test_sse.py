"""What a stream brought: framing, tokens in a chunk, refusals; against a server that writes what a test tells it."""

import json
import socket
import threading

import pytest

from perseid_loadtest import sse
from perseid_loadtest.drive import Arrival

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def text(content, **more):
    return {"choices": [{"index": 0, "text": content}], **more}


def data(event):
    return b"data: " + json.dumps(event).encode() + b"\n\n"


def chunk(payload):
    return f"{len(payload):x}\r\n".encode() + payload + b"\r\n"


def counted(*events):
    return [(arrival.moment, arrival.tokens) for arrival in sse.count_tokens(list(enumerate(events)))]


def test_running_counts_say_how_many_tokens_a_chunk_holds():
    usage = [{"usage": {"completion_tokens": count}} for count in (1, 4, 4, 5)]
    assert counted(*(text("x", **one) for one in usage)) == [(0, 1), (1, 3), (3, 1)]


def test_llama_server_tells_them_in_timings():
    told = [text("x", timings={"predicted_n": count}) for count in (1, 2, 5)]
    assert counted(*told) == [(0, 1), (1, 1), (2, 3)]


def test_tokens_whose_text_is_held_back_count_when_they_are_told():
    assert counted(text("", usage={"completion_tokens": 1}), text("é", usage={"completion_tokens": 2})) == [
        (0, 1),
        (1, 1),
    ]


def test_a_sum_at_the_end_is_shared_by_the_chunks():
    end = {"choices": [], "usage": {"completion_tokens": 6}}
    assert counted(text("ab"), text("c"), text("d"), end) == [(0, 2), (1, 2), (2, 2)]


def test_without_any_count_a_chunk_is_a_token():
    assert counted(text("a", usage=None), text("b"), text("")) == [(0, 1), (1, 1)]


def test_an_answer_of_one_token_told_with_its_count():
    assert counted(text("", usage={"completion_tokens": 1})) == [(0, 1)]


def test_an_error_in_the_stream_is_raised():
    with pytest.raises(sse.ServerError, match="broke"):
        counted(text("a"), {"error": {"message": "the engine broke"}})


def test_events_carry_the_moment_of_their_last_byte():
    first, second = data(text("a")), data(text("b"))
    wire = HEAD + chunk(first + second[:9]) + chunk(second[9:]) + chunk(b"data: [DONE]\n\n") + chunk(b"")
    cut = len(HEAD) + len(chunk(first + second[:9])) + 4
    pieces = [(1.0, wire[:40]), (2.0, wire[40:cut]), (3.0, wire[cut:]), (4.0, b"")]
    assert list(sse.events(pieces)) == [(2.0, text("a")), (3.0, text("b"))]


def test_every_split_of_the_bytes_gives_the_same_events():
    wire = HEAD + chunk(data(text("ü"))) + chunk(data(text("b"))) + chunk(b"data: [DONE]\n\n") + chunk(b"")
    for cut in range(len(wire)):
        pieces = [(1.0, wire[:cut]), (2.0, wire[cut:]), (3.0, b"")]
        assert [event for _, event in sse.events([one for one in pieces if one[1] or one[0] == 3.0])] == [
            text("ü"),
            text("b"),
        ]


def test_a_refusal_is_told_in_the_servers_words():
    body = b'{"error": "no such model"}'
    wire = b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with pytest.raises(sse.ServerError, match=r"404.*no such model"):
        list(sse.events([(1.0, wire), (2.0, b"")]))


@pytest.fixture
def server():
    """Answers every connection with a stream of as many tokens as its body asks for."""
    listener = socket.create_server(("127.0.0.1", 0))
    seen = []

    def answer(connection):
        with connection, connection.makefile("rb") as lines:
            head = iter(lines.readline, b"\r\n")
            length = next(int(line.split(b":")[1]) for line in list(head) if line.lower().startswith(b"content-length"))
            body = json.loads(lines.read(length))
            seen.append(body)
            connection.sendall(HEAD)
            for count in range(body["max_tokens"]):
                connection.sendall(chunk(data(text("x", usage={"completion_tokens": count + 1}))))
            connection.sendall(chunk(b"data: [DONE]\n\n") + chunk(b""))
            lines.read()  # the connection stays open, whatever the client asked for

    def accept():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", seen
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def test_many_streams_at_once(server):
    url, seen = server
    streams = sse.complete(url, [{"max_tokens": count} for count in (3, 1, 5)])
    assert [stream.tokens for stream in streams] == [3, 1, 5]
    assert sorted(body["max_tokens"] for body in seen) == [1, 3, 5]
    assert all(stream.started <= stream.first <= stream.last for stream in streams)


def test_a_stream_without_a_token_is_an_error(server):
    with pytest.raises(sse.ServerError, match="no token"):
        sse.complete(server[0], [{"max_tokens": 0}])


def test_arrivals_are_what_rates_are_made_of():
    assert sse.count_tokens([(1.5, text("a"))]) == (Arrival(1.5, 1.0),)

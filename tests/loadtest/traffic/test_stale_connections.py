"""Servers that close kept connections without saying so: such a request is sent again, a lost one is not."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from perseid_loadtest.traffic import http_target
from perseid_loadtest.traffic.http_target import HttpTarget
from perseid_loadtest.traffic.plan import Request
from perseid_loadtest.traffic.target import Answer, Failed


def whole(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


WHOLE = whole(b'{"choices": [{"text": "abc"}], "usage": {"prompt_tokens": 3, "completion_tokens": 3}}')
CLOSED = "closed"


class Closing:
    """Connection by connection: what each of its completions is answered with. `CLOSED`, or no more: it is closed then,
    when the client has sent the request already."""

    def __init__(self, of_connection: Callable[[int], list]) -> None:
        self._of_connection = of_connection
        self.connections = 0
        self.asked = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers: list | None = None
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).lower():
                length = head.partition(b"content-length: ")[2].split(b"\r\n")[0]
                await reader.readexactly(int(length or 0))
                if not head.startswith(b"post /v1/completions"):
                    writer.write(whole(b'{"data": [{"id": "m"}]}'))
                    continue
                self.asked += 1
                if answers is None:
                    answers = self._of_connection(self.connections)
                    self.connections += 1
                answer = answers.pop(0) if answers else CLOSED
                if callable(answer):
                    answer = await answer()
                if answer is CLOSED:
                    break
                writer.write(answer)
                if answer is not WHOLE:
                    break
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()


@asynccontextmanager
async def connected(server: Closing) -> AsyncIterator[HttpTarget]:
    async with await asyncio.start_server(server, "127.0.0.1", 0) as listening:
        target = HttpTarget(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", stream=False)
        try:
            await target.open()
            yield target
        finally:
            await target.close()


async def ask(target: HttpTarget) -> int:
    answer = Answer(0.0)
    await target.ask(Request(0, "", "text", 3), answer)
    return answer.output_tokens


async def test_a_kept_connection_that_was_closed_costs_no_request():
    server = Closing(lambda _: [WHOLE])
    async with connected(server) as target:
        assert [await ask(target) for _ in range(5)] == [3] * 5
    assert server.connections > 1


async def test_a_new_connection_that_is_closed_is_an_error_at_once():
    server = Closing(lambda _: [CLOSED])
    async with connected(server) as target:
        with pytest.raises(Failed, match="connection"):
            await ask(target)
    assert server.asked == 1


async def test_a_server_that_closes_the_second_connection_too_is_an_error():
    server = Closing(lambda number: [WHOLE] if number == 0 else [CLOSED])
    async with connected(server) as target:
        await ask(target)
        with pytest.raises(Failed, match="connection"):
            await ask(target)
    assert (server.connections, server.asked) == (2, 3)


async def test_a_server_that_dies_with_the_request_is_an_error(monkeypatch: pytest.MonkeyPatch):
    """It took longer than a connection that was closed before takes to show."""
    monkeypatch.setattr(http_target, "STALE_S", 0.01)

    async def works_then_dies():
        await asyncio.sleep(0.05)
        return CLOSED

    server = Closing(lambda _: [WHOLE, works_then_dies])
    async with connected(server) as target:
        await ask(target)
        with pytest.raises(Failed, match="connection"):
            await ask(target)
    assert server.asked == 2


@pytest.mark.parametrize("part", [WHOLE[:9], WHOLE[:-5]])
async def test_an_answer_that_has_begun_is_not_asked_for_again(part: bytes):
    server = Closing(lambda _: [WHOLE, part])
    async with connected(server) as target:
        await ask(target)
        with pytest.raises(Failed):
            await ask(target)
    assert server.asked == 2

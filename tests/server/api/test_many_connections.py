"""Connections that do nothing, or never become one: thousands of them are harmless, and so is one too many."""

import asyncio
import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from perseid_server.api import server
from perseid_server.api.descriptors import ENOUGH, allow_connections, connections_of_each
from perseid_server.api.http import listener, protocol
from perseid_server.api.tls import Tls, TlsFiles
from tests.server.api.test_tls import files  # noqa: F401  a fixture
from tests.server.stack import LiveStack, make_stack, serving, until

BODY = {"model": "tiny", "prompt": "say", "max_tokens": 4}
Connections = list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]


async def connect(port: int, count: int, data: bytes = b"") -> Connections:
    made = []
    for _ in range(count):
        made.append(await asyncio.open_connection("127.0.0.1", port))
        made[-1][1].write(data)
    return made


async def close(connections: Connections) -> None:
    for _, writer in connections:
        writer.transport.abort()


async def answered(http_port: int, grpc_port: int, verify: ssl.SSLContext | bool = True) -> None:
    """Both transports answer new clients."""
    scheme = "http" if verify is True else "https"
    async with httpx.AsyncClient(base_url=f"{scheme}://127.0.0.1:{http_port}", timeout=20, verify=verify) as client:
        assert (await client.post("/v1/completions", json=BODY)).status_code == 200
    if verify is True:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}", [("grpc.use_local_subchannel_pool", 1)]) as told:
            check = health_pb2_grpc.HealthStub(told).Check
            assert (await check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=20)).status


@pytest.mark.parametrize(
    "beginning",
    [b"", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
    ids=["silent", "headers that do not end", "HTTP/2 that stops"],
)
async def test_thousands_of_connections_that_say_no_more(live: LiveStack, beginning: bytes) -> None:
    ports = live.addresses.http_port, live.addresses.grpc_port
    count = min(1000, (allow_connections() - 500) // 4)  # both ends are in this process
    idle = [await connect(port, count, beginning) for port in ports]
    await answered(*ports)
    for one in idle:
        await close(one)
    await answered(*ports)


async def test_connections_of_clients_that_vanished_are_asked_for_them(live: LiveStack) -> None:
    [(_, writer)] = await connect(live.addresses.http_port, 1)
    await until(lambda: bool(_protocols(live)))
    [one] = _protocols(live)
    accepted = one.transport.get_extra_info("socket")
    assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == server._KEEPALIVE["TCP_KEEPIDLE"]
    writer.close()


def _protocols(live: LiveStack) -> list[protocol.PatientProtocol]:
    return list(live.api._http.server_state.connections)


async def test_tls_handshakes_that_do_not_end(tmp_path, files, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(listener, "HANDSHAKE_TIMEOUT_S", 2.0)
    trust = ssl.create_default_context(cafile=files.ca)
    async with serving(make_stack(tmp_path / "stack"), Tls(TlsFiles(files.cert, files.key))) as live:
        hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"  # the beginning of one
        waiting = await connect(live.addresses.http_port, 100, hello)
        more = await connect(live.addresses.grpc_port, 100, hello)
        await answered(live.addresses.http_port, live.addresses.grpc_port, trust)
        async with asyncio.timeout(20):
            for reader, _ in waiting:
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
        await close([*waiting, *more])


# --- one too many ---------------------------------------------------------------------------------------------------


async def closed_by_server(connections: Connections, count: int) -> None:
    """Return when so many of them have been closed."""

    def ended() -> int:
        return sum(reader.at_eof() or reader.exception() is not None for reader, _ in connections)

    await until(lambda: ended() >= count)


async def test_a_connection_too_many_is_closed_and_the_others_are_served(tmp_path) -> None:
    async with serving(make_stack(tmp_path), most_connections=20) as live:
        ports = live.addresses.http_port, live.addresses.grpc_port
        for port in ports:
            held = await connect(port, 25)
            await closed_by_server(held, 5)
            if port == ports[0]:
                _, writer = held[0]
                writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                assert (await held[0][0].readline()).startswith(b"HTTP/1.1 200")
            await close(held)
        await until(lambda: not _protocols(live))
        await answered(*ports)


async def test_a_handshake_too_many_is_closed_and_the_others_are_served(tmp_path, files) -> None:  # noqa: F811
    """A connection takes a descriptor from its first moment, long before TLS has come about."""
    trust = ssl.create_default_context(cafile=files.ca)
    tls = Tls(TlsFiles(files.cert, files.key))
    async with serving(make_stack(tmp_path / "stack"), tls, most_connections=20) as live:
        port = live.addresses.http_port
        first = await asyncio.open_connection("127.0.0.1", port, ssl=trust)
        held = await connect(port, 24)
        await closed_by_server(held, 5)
        assert len(_protocols(live)) == 1
        first[1].write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await first[0].readline()).startswith(b"HTTP/1.1 200")
        await close([first, *held])
        await until(lambda: not _protocols(live) and not live.api._listener.handshakes)
        await answered(port, 0, trust)


async def test_handshakes_that_fail_make_room(tmp_path, files) -> None:  # noqa: F811
    trust = ssl.create_default_context(cafile=files.ca)
    tls = Tls(TlsFiles(files.cert, files.key))
    async with serving(make_stack(tmp_path / "stack"), tls, most_connections=2) as live:
        for data in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x01\x00", b""):
            for _ in range(3):
                [(reader, writer)] = await connect(live.addresses.http_port, 1, data)
                writer.write_eof()
                with contextlib.suppress(ConnectionError):
                    await reader.read()
                await close([(reader, writer)])
        await until(lambda: not live.api._listener.handshakes)
        await answered(live.addresses.http_port, 0, trust)


async def test_the_end_does_not_wait_for_handshakes(tmp_path, files) -> None:  # noqa: F811
    async with serving(make_stack(tmp_path / "stack"), Tls(TlsFiles(files.cert, files.key))) as live:
        held = await connect(live.addresses.http_port, 3)
        await until(lambda: live.api._listener.handshakes == 3)
    await closed_by_server(held, 3)
    await close(held)


@contextlib.asynccontextmanager
async def few_descriptors(*arguments: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, list[int]]]:
    """A server with a limit of open files, and its ports."""
    path = os.pathsep.join([str(Path(__file__).parents[3]), *filter(None, sys.path)])
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.server.api.few_descriptors", *arguments, env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(60):
            told = await process.stdout.readline()
        yield process, json.loads(told)["ports"]
    finally:
        process.kill()
        await process.wait()


@pytest.mark.parametrize("with_tls", [False, True], ids=["plain", "handshakes"])
async def test_adapters_load_while_clients_take_all_connections_they_can(files, with_tls: bool) -> None:  # noqa: F811
    certificate = (str(files.cert), str(files.key)) if with_tls else ()
    async with few_descriptors("400", *certificate) as (process, ports):
        held = [await connect(port, 250) for port in ports]
        for connections in held:
            await closed_by_server(connections, 100)
        process.stdin.write(b"load\n")
        async with asyncio.timeout(30):
            assert json.loads(await process.stdout.readline()) == {"error": None}
        for connections in held:
            await close(connections)
        await answered(*ports, ssl.create_default_context(cafile=files.ca) if with_tls else True)


async def test_a_server_without_descriptors_serves_again_when_there_are_some() -> None:
    """What accepts finds none left: neither transport ends or gives up its port."""
    async with few_descriptors("150", "unbounded") as (process, ports):
        for port in ports:
            held = await connect(port, 200)
            held += await connect(ports[1] if port == ports[0] else ports[0], 20)
            await close(held)
            await answered(*ports)
        assert process.returncode is None


# --- the limit ------------------------------------------------------------------------------------------------------


def limited(soft: int, hard: int) -> subprocess.CompletedProcess[str]:
    """What a process of its own makes of its limits."""
    code = (
        "import logging, resource as r; logging.basicConfig()\n"
        f"r.setrlimit(r.RLIMIT_NOFILE, ({soft}, {hard}))\n"
        "from perseid_server.api.descriptors import allow_connections\n"
        "print(allow_connections(), *r.getrlimit(r.RLIMIT_NOFILE))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)


def test_the_limit_is_raised_as_far_as_it_goes() -> None:
    told = limited(100, ENOUGH)
    assert told.stdout.split() == [str(ENOUGH)] * 3
    assert not told.stderr


def test_a_low_limit_is_told_with_what_to_do() -> None:
    told = limited(100, ENOUGH - 1)
    assert told.stdout.split() == [str(ENOUGH - 1)] * 3
    assert f"at most {ENOUGH - 1} files and connections may be open at once" in told.stderr
    assert "ulimit -n" in told.stderr


@pytest.mark.parametrize(("allowed", "each"), [(-1, None), (20_000, 9872), (1024, 384), (400, 150), (8, 3), (1, 1)])
def test_each_transport_leaves_descriptors_to_the_other_and_to_files(allowed: int, each: int | None) -> None:
    assert connections_of_each(allowed) == each

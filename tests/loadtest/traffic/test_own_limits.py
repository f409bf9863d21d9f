"""What this machine cannot do is the load generator's fault, and not told as the server's."""

import errno
import os
import resource

import aiohttp
import grpc
import pytest

from perseid_loadtest.traffic.grpc_target import _failed
from perseid_loadtest.traffic.http_target import HttpTarget
from perseid_loadtest.traffic.plan import Request
from perseid_loadtest.traffic.target import Answer, Failed
from tests.server.cli.running import Perseid


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EMFILE, "client"),
        (errno.ENFILE, "client"),
        (errno.EADDRNOTAVAIL, "client"),
        (errno.ECONNREFUSED, "connection"),
    ],
)
async def test_connections_that_cannot_be_made_here(number, kind, monkeypatch):
    async def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("aiohttp.connector.aiohappyeyeballs.start_connection", fail)
    target = HttpTarget("http://127.0.0.1:1")
    target._session = target._fresh = aiohttp.ClientSession()  # as `open` makes them, which needs a server
    for asking in (target.ask(Request(0, "", (1,), 1), Answer(0.0)), target.unload("a")):
        with pytest.raises(Failed, match=f"^{kind}$") as failed:
            await asking
        assert os.strerror(number).lower() in failed.value.message
    await target.close()


@pytest.mark.parametrize(
    ("details", "kind"),
    [
        ("failed to connect to all addresses; last error: INTERNAL: ipv4:1: socket: Too many open files", "client"),
        ("failed to connect to all addresses; last error: UNKNOWN: ipv4:1: Connection refused", "UNAVAILABLE"),
        ("the adapter cannot be read: Too many open files", "UNAVAILABLE"),  # the server's own
    ],
)
def test_a_channel_that_cannot_connect_from_here(details, kind):
    none = grpc.aio.Metadata()
    error = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, none, none, details=details)
    assert _failed(error).kind == kind


def test_it_may_open_as_many_files_as_the_system_allows(perseid: Perseid):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1] - 1, before[1]))
    try:
        assert perseid("loadtest", "--target", "http://127.0.0.1:1").status == 1
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

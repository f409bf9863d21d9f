"""Calls whose bytes are no message: every service answers them, and says whose mistake it was. grpc.aio ended them with
UNKNOWN and a Python exception's text, and logged a traceback for each."""

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from perseid_server.api.grpc.server import SERVICES
from tests.server.stack import LiveStack

UNARY = (
    "/perseid.v1.Generation/Generate",
    "/perseid.v1.Generation/GenerateStream",
    "/perseid.v1.AdapterAdmin/GetAdapter",
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
)
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


async def refused(live: LiveStack, method: str, *sent: bytes) -> grpc.aio.AioRpcError:
    async def messages():
        for raw in sent:
            yield raw

    async with grpc.aio.insecure_channel(live.grpc) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            async for _ in channel.stream_stream(method)(messages(), timeout=20):
                pass
    return error.value


@pytest.mark.parametrize("method", [*UNARY, REFLECTION])
@pytest.mark.parametrize("raw", [b"\xff\xff", b"\x0a\x02\xff\xfe", b"\x12\xff\xff\xff\xff\x0f"], ids=repr)
async def test_bytes_that_are_no_message(live: LiveStack, method: str, raw: bytes) -> None:
    error = await refused(live, method, raw)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error.details()
    assert f"the {len(raw)} bytes sent are no message of {method}" in error.details()


async def test_a_broken_message_behind_good_ones(live: LiveStack) -> None:
    """A stream of questions is answered up to there."""
    error = await refused(live, REFLECTION, b"\x3a\x01*", b"\xff")
    assert (error.code(), "the 1 bytes sent" in error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, True)


async def test_health_lists_its_services(live: LiveStack) -> None:
    """The library left List to a base class that fails."""
    async with grpc.aio.insecure_channel(live.grpc) as channel:
        told = await health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest(), timeout=20)
    assert {name: status.status for name, status in told.statuses.items()} == dict.fromkeys(
        ("", *SERVICES), health_pb2.HealthCheckResponse.SERVING
    )


async def test_health_names_the_service_that_is_not_known(live: LiveStack) -> None:
    async with grpc.aio.insecure_channel(live.grpc) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=20)
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    assert "'nobody' is not known" in error.value.details()

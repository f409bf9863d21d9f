"""Keys over both transports at once: one count, strange headers, and what becomes of a stream whose key is revoked."""

import asyncio
import contextlib

import grpc
import httpx
import pytest

from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from perseid_server.access.gate import Gate
from perseid_server.access.keys import Allowance, KeyRing
from tests.server.access.rings import Keys, bearer, gate_of, key
from tests.server.stack import LiveStack, Stack, make_stack, serving

BODY = {"model": "tiny", "prompt": "say", "max_tokens": 2}
ASKED = pb.GenerateRequest(prompt="say", sampling=pb.SamplingParams(max_tokens=2))


@pytest.fixture
def stack(tmp_path) -> Stack:
    few, poor = Allowance(requests_per_minute=4), Allowance(tokens_total=20)
    return make_stack(tmp_path, gate=gate_of(key("user"), key("few", allowance=few), key("poor", allowance=poor)))


async def over_http(live: LiveStack, headers: dict | list) -> int:
    async with live.http() as client:
        return (await client.post("/v1/completions", json=BODY, headers=headers)).status_code


async def over_grpc(live: LiveStack, metadata: tuple[tuple[str, str], ...]) -> grpc.StatusCode:
    async with grpc.aio.insecure_channel(live.grpc) as channel:
        try:
            await stubs.GenerationStub(channel).Generate(ASKED, metadata=metadata, timeout=20)
        except grpc.aio.AioRpcError as error:
            return error.code()
    return grpc.StatusCode.OK


async def test_both_transports_share_one_rate(live: LiveStack) -> None:
    metadata = tuple(bearer("few").items())
    for _ in range(2):
        assert await over_http(live, bearer("few")) == 200
        assert await over_grpc(live, metadata) is grpc.StatusCode.OK
    assert await over_http(live, bearer("few")) == 429
    assert await over_grpc(live, metadata) is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_both_transports_share_one_quota(live: LiveStack) -> None:
    used = live.stack.gate.limiter.ledger.used
    assert await over_http(live, bearer("poor")) == 200
    assert used("poor").total == 5
    assert await over_grpc(live, tuple(bearer("poor").items())) is grpc.StatusCode.OK
    assert used("poor").total == 10
    for _ in range(2):
        assert await over_http(live, bearer("poor")) == 200
    assert await over_grpc(live, tuple(bearer("poor").items())) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert used("poor").total == 20


@pytest.mark.parametrize(
    "headers",
    [
        [("Authorization", "Bearer user"), ("Authorization", "Bearer user")],
        [("Authorization", "Bearer nobody"), ("authorization", "Bearer user")],
        [("X-Api-Key", "user"), ("x-api-key", "user")],
        [("Authorization", "Bearer user, Bearer user")],
        [("Authorization", "Bearer us\u00e9r".encode("latin-1"))],
        [("Authorization", "Bearer \u043aey".encode())],
        [("Authorization", b"Bearer \xff\xfe")],
        [("Authorization", "Bearer " + "x" * 4000)],
        [("Authorization", "Bearer user\tx")],
        [("Authorization", "user")],
        [("Authorization", "")],
    ],
)
async def test_strange_headers_are_no_key(headers: list, live: LiveStack) -> None:
    assert await over_http(live, headers) == 401
    assert await over_http(live, bearer("user")) == 200


async def test_headers_without_end_are_cut_off(live: LiveStack) -> None:
    with contextlib.suppress(httpx.TransportError):  # the connection may be gone before all of it is sent
        assert await over_http(live, bearer("x" * (1 << 20))) in {400, 401, 431}
    assert await over_http(live, bearer("user")) == 200


@pytest.mark.parametrize(
    "metadata",
    [
        (("authorization", "Bearer user"), ("authorization", "Bearer user")),
        (("authorization", "Bearer nobody"), ("authorization", "Bearer user")),
        (("authorization", "Bearer user"), ("authorization", "Bearer nobody")),
        (("authorization-bin", b"Bearer user"),),
        (("authorization", "Bearer " + "x" * 2000),),
        (("authorization", "user"),),
    ],
)
async def test_strange_metadata_is_no_key(metadata, live: LiveStack) -> None:
    assert await over_grpc(live, metadata) is grpc.StatusCode.UNAUTHENTICATED
    assert await over_grpc(live, (("authorization", "bEARER user"),)) is grpc.StatusCode.OK
    assert await over_grpc(live, (("x-api-key", "user"),)) is grpc.StatusCode.OK


async def test_metadata_without_end_is_refused(live: LiveStack) -> None:
    told = await over_grpc(live, (("authorization", "Bearer " + "x" * (1 << 20)),))
    assert told in {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE}
    assert await over_grpc(live, tuple(bearer("user").items())) is grpc.StatusCode.OK


async def test_a_stream_whose_key_is_revoked_comes_to_its_end_and_the_next_does_not_begin(tmp_path) -> None:
    """A key is looked at when a call begins. Who must be cut off at once restarts the server."""
    keys = Keys(KeyRing({"user": key("user")}))
    stack = make_stack(tmp_path, gate=Gate(keys))
    async with serving(stack) as live, live.http() as client, grpc.aio.insecure_channel(live.grpc) as channel:
        stack.engine.hold()
        running = asyncio.create_task(client.post("/v1/completions", json=BODY, headers=bearer("user")))
        metadata = tuple(bearer("user").items())
        call = stubs.GenerationStub(channel).GenerateStream(ASKED, metadata=metadata)
        streaming = asyncio.create_task(anext(aiter(call)))
        await stack.engine.submissions(2)
        keys.ring = KeyRing({})
        assert await over_http(live, bearer("user")) == 401
        assert await over_grpc(live, metadata) is grpc.StatusCode.UNAUTHENTICATED
        stack.engine.go_on()
        assert (await running).status_code == 200
        chunks = [await streaming, *[chunk async for chunk in call]]
        assert sum(len(chunk.token_ids) for chunk in chunks) == 2

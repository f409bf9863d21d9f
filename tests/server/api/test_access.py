"""Keys and roles over real sockets: every route and every method says who may call it."""

import grpc
import httpx
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from perseid_protos.perseid.v1 import adapter_admin_pb2 as admin
from perseid_protos.perseid.v1 import adapter_admin_pb2_grpc as admin_stubs
from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from perseid_server.access.keys import Allowance
from perseid_server.api.grpc.access import need_of as need_of_method
from perseid_server.api.grpc.server import SERVICES
from perseid_server.api.http.access import NEEDS, need_of
from tests.server.access.rings import bearer, gate_of, key
from tests.server.stack import LiveStack, make_stack, serving

BODY = {"model": "tiny", "prompt": "say", "max_tokens": 4}


@pytest.fixture
def stack(tmp_path):
    few = Allowance(requests_per_minute=2, tokens_per_minute=1000)
    gate = gate_of(
        key("user"), key("root", "admin"), key("part", "admin", adapters=("p-*",)), key("few", allowance=few),
        key("off", enabled=False), key("poor", allowance=Allowance(tokens_total=5)),
    )  # fmt: skip
    return make_stack(tmp_path, gate=gate)


async def call(live: LiveStack, method: str, path: str, secret: str | None, **more) -> httpx.Response:
    async with live.http() as client:
        return await client.request(method, path, headers=bearer(secret) if secret else {}, **more)


def test_every_route_says_what_it_needs(stack) -> None:
    paths = {path.partition("{")[0] for _, path in stack.routes()} - {"/metrics"}
    assert paths - set(NEEDS) == {"/v1/models/", "/v1/medusa_heads/"}
    assert need_of("/a/route/of/tomorrow", stack.gate) == need_of_method("/perseid.v2.New/Do") == "operator"


@pytest.mark.parametrize("secret", [None, "nobody", "off"])
async def test_without_a_good_key_only_health_is_told(live: LiveStack, secret: str | None) -> None:
    for path in ("/health", "/ready", "/version"):
        assert (await call(live, "GET", path, secret)).status_code == 200
    for method, path in live.stack.routes():
        if path not in {"/health", "/ready", "/version"}:
            told = await call(live, method, path, secret, content=b"{nonsense")
            assert told.status_code == 401, path
            assert told.headers["WWW-Authenticate"].startswith("Bearer")
            assert told.headers["X-Request-Id"]
            assert "nobody" not in told.text


@pytest.mark.parametrize(
    ("secret", "path", "status"),
    [
        ("user", "/v1/models", 200), ("user", "/openapi.json", 200), ("root", "/openapi.json", 200),
        ("root", "/v1/models", 403), ("user", "/metrics", 403), ("root", "/metrics", 200), ("part", "/metrics", 403),
        ("user", "/v1/nothing", 404), ("user", "//metrics", 403), ("user", "/metrics/", 403),
        ("user", "/debug/state", 403), ("part", "/debug/state", 403), ("root", "/debug/state", 200),
    ],
)  # fmt: skip
async def test_roles(live: LiveStack, secret: str, path: str, status: int) -> None:
    assert (await call(live, "GET", path, secret)).status_code == status


async def test_only_admins_load(live: LiveStack) -> None:
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        told = await call(live, "POST", path, "user", json={"lora_name": "x", "lora_path": "x"})
        assert (told.status_code, told.json()["error"]["type"]) == (403, "permission_error")
    told = await call(live, "POST", "/v1/completions", "root", json=BODY)
    assert told.status_code == 403


async def test_the_key_may_be_in_either_header(live: LiveStack) -> None:
    async with live.http() as client:
        assert (await client.get("/v1/models", headers={"X-Api-Key": "user"})).status_code == 200
        assert (await client.get("/v1/models", headers={"Authorization": "bearer  user"})).status_code == 200
        assert (await client.get("/v1/models", headers={"Authorization": "Basic user"})).status_code == 401


async def test_metrics_may_be_open(tmp_path) -> None:
    async with serving(make_stack(tmp_path, gate=gate_of(open_metrics=True))) as live:
        assert (await call(live, "GET", "/metrics", None)).status_code == 200
        assert (await call(live, "GET", "/debug/state", None)).status_code == 401


async def test_limits_over_http(live: LiveStack) -> None:
    first = await call(live, "POST", "/v1/completions", "few", json=BODY)
    assert first.status_code == 200
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-limit-tokens"] == "1000"
    await call(live, "GET", "/v1/models", "few")
    third = await call(live, "GET", "/v1/models", "few")
    assert (third.status_code, third.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(third.headers["Retry-After"]) <= 30
    assert (third.headers["x-ratelimit-limit-requests"], third.headers["x-ratelimit-remaining-requests"]) == ("2", "0")
    assert (await call(live, "GET", "/v1/models", "user")).status_code == 200


async def test_quotas_count_prompts_and_answers(live: LiveStack) -> None:
    assert (await call(live, "POST", "/v1/completions", "poor", json=BODY)).status_code == 200
    spent = await call(live, "POST", "/v1/completions", "poor", json=BODY)
    assert (spent.status_code, spent.json()["error"]["code"]) == (429, "insufficient_quota")
    assert live.stack.gate.limiter.ledger.used("poor").total == 7


@pytest_asyncio.fixture
async def channel(live: LiveStack):
    async with grpc.aio.insecure_channel(live.grpc) as channel:
        yield channel


def methods(channel: grpc.aio.Channel) -> list:
    """Every method of ours, with an empty message."""
    generation, adapters = stubs.GenerationStub(channel), admin_stubs.AdapterAdminStub(channel)
    found = [(generation.Generate, pb.GenerateRequest()), (generation.GenerateStream, pb.GenerateRequest())]
    names = [method.name for method in admin.DESCRIPTOR.services_by_name["AdapterAdmin"].methods]
    found += [(getattr(adapters, name), getattr(admin, f"{name}Request")()) for name in names]
    told = [pb.DESCRIPTOR.services_by_name["Generation"], admin.DESCRIPTOR.services_by_name["AdapterAdmin"]]
    assert len(found) == sum(len(service.methods) for service in told)
    assert len(told) == len(SERVICES)
    return found


async def code_of(method, message, secret: str | None) -> grpc.StatusCode:
    metadata = tuple(bearer(secret).items()) if secret else ()
    try:
        call = method(message, metadata=metadata)
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_every_method_needs_a_key(channel) -> None:
    for method, message in methods(channel):
        for secret in (None, "nobody", "off"):
            assert await code_of(method, message, secret) is grpc.StatusCode.UNAUTHENTICATED


async def test_every_method_needs_its_role(channel) -> None:
    for place, (method, message) in enumerate(methods(channel)):
        wrong, right = ("root", "user") if place < 2 else ("user", "root")
        assert await code_of(method, message, wrong) is grpc.StatusCode.PERMISSION_DENIED
        assert await code_of(method, message, right) not in {
            grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED
        }  # fmt: skip


async def test_grpc_health_is_open_and_limits_hold(channel) -> None:
    assert await code_of(
        health_pb2_grpc.HealthStub(channel).Check, health_pb2.HealthCheckRequest(), None
    ) is grpc.StatusCode.OK  # fmt: skip
    asked = pb.GenerateRequest(prompt="say", sampling=pb.SamplingParams(max_tokens=1))
    codes = [await code_of(stubs.GenerationStub(channel).Generate, asked, "few") for _ in range(3)]
    assert codes == [grpc.StatusCode.OK, grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED]

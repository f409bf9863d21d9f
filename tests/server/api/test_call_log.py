"""Every call has one line in the log, whatever becomes of it, and what clients write is not in it."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from perseid_protos.perseid.v1 import adapter_admin_pb2 as admin
from perseid_protos.perseid.v1 import adapter_admin_pb2_grpc as admin_stubs
from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from perseid_server.access.keys import Allowance
from perseid_server.api.grpc.observed import _Running
from perseid_server.api.http import bodies
from perseid_server.observe.calls import Calls
from perseid_server.observe.record import CallRecord
from tests.server.access.rings import bearer, gate_of, key
from tests.server.stack import LiveStack, Stack, make_stack, serving, write_adapter

SECRET = "a users own words"
BODY = {"model": "one", "prompt": SECRET, "max_tokens": 4, "temperature": 0}
GENERATE, STREAM = "perseid.v1.Generation/Generate", "perseid.v1.Generation/GenerateStream"
Fields = dict[str, Any]


@pytest.fixture
def stack(tmp_path) -> Stack:
    few = Allowance(requests_per_minute=1)
    return make_stack(tmp_path, gate=gate_of(key("user"), key("root", "admin"), key("few", allowance=few)))


@pytest_asyncio.fixture(autouse=True)
async def adapter(live: LiveStack) -> None:
    await live.stack.load("one")


@pytest_asyncio.fixture
async def channel(live: LiveStack) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(live.grpc) as channel:
        yield channel


@pytest.fixture
def lines(live: LiveStack, caplog: pytest.LogCaptureFixture) -> Callable[[], Awaitable[list[Fields]]]:
    """All lines so far, when all calls are over."""
    caplog.set_level(logging.INFO)

    async def told() -> list[Fields]:
        async with asyncio.timeout(20):
            while live.stack.calls.open_calls:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        return [record.fields for record in caplog.records if record.name == "perseid_server.calls"]

    return told


async def post(live: LiveStack, body: Any = BODY, *, secret: str = "user", path="/v1/completions", **more):
    async with live.http() as client:
        headers = bearer(secret) | more.pop("headers", {})
        return await client.post(path, json=body, headers=headers, **more)


def message(**more: Any) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(max_tokens=more.pop("max_tokens", 4), temperature=0)
    return pb.GenerateRequest(**({"prompt": SECRET, "adapter": "one", "sampling": sampling} | more))


def metadata(secret: str = "user", **more: str) -> tuple[tuple[str, str], ...]:
    return tuple((bearer(secret) | {name.replace("_", "-"): value for name, value in more.items()}).items())


async def code_of(call: Any) -> grpc.StatusCode:
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def check_answered(line: Fields, live: LiveStack) -> None:
    version = live.stack.registry.get("one").version[:12]
    told = {name: value for name, value in line.items() if not name.endswith("_s") and name != "answer"}
    assert told == {
        "request_id": "mine-7", "tenant": "user", "key": "user", "model": "one", "adapter": f"one@{version}",
        "prompt_tokens": len(SECRET), "generated_tokens": 4, "finish_reason": "length",
    } | {name: line[name] for name in ("transport", "route", "status")}  # fmt: skip
    assert 0 <= line["queue_s"] <= line["ttft_s"] <= line["duration_s"]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_over_http(live: LiveStack, lines, stream: bool) -> None:
    told = await post(live, BODY | {"stream": stream}, headers={"X-Request-Id": "mine-7"})
    assert told.headers["X-Request-Id"] == "mine-7"
    (line,) = await lines()
    assert (line["transport"], line["route"], line["status"]) == ("http", "POST /v1/completions", 200)
    assert line["answer"] in told.text
    check_answered(line, live)


@pytest.mark.parametrize("route", [GENERATE, STREAM])
async def test_an_answer_over_grpc(live: LiveStack, channel, lines, route: str) -> None:
    stub = stubs.GenerationStub(channel)
    call = (stub.Generate if route == GENERATE else stub.GenerateStream)(
        message(), metadata=metadata(x_request_id="mine-7")
    )
    assert await code_of(call) is grpc.StatusCode.OK
    assert ("x-request-id", "mine-7") in tuple(await call.trailing_metadata())
    (line,) = await lines()
    assert (line["transport"], line["route"], line["status"]) == ("grpc", route, "OK")
    assert line["answer"] == "mine-7"
    check_answered(line, live)


async def test_an_id_that_does_not_fit_is_replaced(channel, lines) -> None:
    call = stubs.GenerationStub(channel).Generate(message(), metadata=metadata(x_request_id="a b"))
    told = await call
    (line,) = await lines()
    assert len(line["request_id"]) == 32
    assert ("x-request-id", line["request_id"]) in tuple(await call.trailing_metadata())
    assert told.request_id == line["request_id"]


HTTP_REFUSED = [  # of a request: what is changed, then status, error, field, key
    ({"path": "/v1/nothing"}, 404, "not_found", None, "user"),
    ({"content": b"{"}, 400, "invalid_request", None, "user"),
    ({"body": BODY | {"temperature": 9}}, 400, "invalid_request", "temperature", "user"),
    ({"body": BODY | {"temperature": "hot"}}, 400, "invalid_request", "temperature", "user"),
    ({"body": BODY | {"model": "none"}}, 404, "model_not_found", "model", "user"),
    ({"secret": "nobody"}, 401, "unauthenticated", None, None),
    ({"secret": "root"}, 403, "forbidden", None, "root"),
    ({"body": {"prompt": "x" * 1000}}, 413, "too_large", None, "user"),
    ({"body": BODY | {"timeout": 1e-9}}, 408, "deadline_exceeded", "timeout", "user"),
]


@pytest.mark.parametrize(("changes", "status", "error", "field", "name"), HTTP_REFUSED)
async def test_what_is_refused_over_http(
    live: LiveStack, lines, changes, status, error, field, name, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "MAX_BODY_BYTES", 999)
    if "content" in changes:
        async with live.http() as client:
            told = await client.post("/v1/completions", headers=bearer("user"), **changes)
    else:
        told = await post(live, **changes)
    assert told.status_code == status
    (line,) = await lines()
    assert line["request_id"] == told.headers["X-Request-Id"]
    assert (line["status"], line["error"]) == (status, error)
    assert (line.get("error_field"), line.get("key")) == (field, name)
    assert line["duration_s"] >= 0


GRPC_REFUSED = [
    ({"secret": "nobody"}, "UNAUTHENTICATED", "unauthenticated", None),
    ({"secret": "root"}, "PERMISSION_DENIED", "forbidden", "root"),
    ({"adapter": "none"}, "NOT_FOUND", "not_found", "user"),
    ({"max_tokens": 0}, "INVALID_ARGUMENT", "invalid_request", "user"),
]


@pytest.mark.parametrize("route", [GENERATE, STREAM])
@pytest.mark.parametrize(("changes", "status", "error", "name"), GRPC_REFUSED)
async def test_what_is_refused_over_grpc(channel, lines, route, changes, status, error, name) -> None:
    stub = stubs.GenerationStub(channel)
    secret = changes.get("secret", "user")
    asked = message(**{field: value for field, value in changes.items() if field != "secret"})
    call = (stub.Generate if route == GENERATE else stub.GenerateStream)(asked, metadata=metadata(secret))
    assert (await code_of(call)).name == status
    (line,) = await lines()
    assert ("x-request-id", line["request_id"]) in tuple(await call.trailing_metadata())
    assert (line["route"], line["status"], line["error"], line.get("key")) == (route, status, error, name)


async def test_a_key_that_asks_too_often_is_named(live: LiveStack, channel, lines) -> None:
    assert (await post(live, secret="few")).status_code == 200
    assert (await post(live, secret="few")).status_code == 429
    call = stubs.GenerationStub(channel).Generate(message(), metadata=metadata("few"))
    assert await code_of(call) is grpc.StatusCode.RESOURCE_EXHAUSTED
    _, second, third = await lines()
    assert (second["status"], second["error"], second["key"]) == (429, "rate_limited", "few")
    assert (third["status"], third["error"], third["key"]) == ("RESOURCE_EXHAUSTED", "rate_limited", "few")


async def test_no_such_method(channel, lines) -> None:
    call = channel.unary_unary("/perseid.v9.Nothing/Do")(b"", metadata=metadata())
    assert await code_of(call) is grpc.StatusCode.UNIMPLEMENTED
    (line,) = await lines()
    assert (line["route"], line["status"], line["error"]) == ("perseid.v9.Nothing/Do", "UNIMPLEMENTED", "unimplemented")


async def test_a_stream_of_requests(channel, lines) -> None:
    """As reflection has it."""
    call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(metadata=metadata())
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    assert "perseid.v1.Generation" in str(await call.read())
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    (line,) = await lines()
    assert (line["route"], line["status"]) == ("grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", "OK")
    assert ("x-request-id", line["request_id"]) in tuple(await call.trailing_metadata())


async def test_a_server_that_drains_or_has_no_engine(live: LiveStack, channel, lines) -> None:
    live.stack.engine.status = "restarting"
    assert (await post(live)).status_code == 503
    await live.stack.service.drain(0)
    assert (await post(live)).status_code == 503
    call = stubs.GenerationStub(channel).Generate(message(), metadata=metadata())
    assert await code_of(call) is grpc.StatusCode.UNAVAILABLE
    told = await lines()
    assert [(line["status"], line["error"]) for line in told] == [
        (503, "unavailable"), (503, "unavailable"), ("UNAVAILABLE", "unavailable")
    ]  # fmt: skip


async def test_an_engine_that_dies_amid_answers(live: LiveStack, channel, lines) -> None:
    engine = live.stack.engine
    engine.hold_after(4)
    async with live.http() as client:
        body = BODY | {"stream": True, "max_tokens": 200}
        async with client.stream("POST", "/v1/completions", json=body, headers=bearer("user")) as answer:
            pieces = answer.aiter_lines()
            await anext(pieces)
            call = stubs.GenerationStub(channel).GenerateStream(message(), metadata=metadata())
            await engine.submissions(2)
            engine.die()
            assert "engine stopped" in "".join([piece async for piece in pieces])
    assert await code_of(call) is grpc.StatusCode.UNAVAILABLE
    told = {line["transport"]: line for line in await lines()}
    assert (told["http"]["status"], told["http"]["error"]) == (200, "unavailable")
    assert told["http"]["generated_tokens"] >= 1
    assert "finish_reason" not in told["http"]
    assert (told["grpc"]["status"], told["grpc"]["error"]) == ("UNAVAILABLE", "unavailable")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_over_http(live: LiveStack, lines, stream: bool) -> None:
    live.stack.engine.hold()
    with pytest.raises(httpx.ReadTimeout):
        await post(live, BODY | {"stream": stream}, timeout=0.2)
    (line,) = await lines()
    assert (line["status"], line["error"], line["model"]) == (200 if stream else 499, "aborted", "one")


async def test_a_client_that_leaves_amid_an_answer_over_http(live: LiveStack, lines) -> None:
    body = BODY | {"stream": True, "max_tokens": 200}
    posted = {"json": body, "headers": bearer("user")}
    live.stack.engine.hold_after(4)
    async with live.http() as client, client.stream("POST", "/v1/completions", **posted) as answer:
        await anext(answer.aiter_lines())
    (line,) = await lines()
    assert (line["status"], line["error"]) == (200, "aborted")
    assert line["generated_tokens"] >= 1


@pytest.mark.parametrize("read_first", [False, True])
async def test_a_client_that_leaves_over_grpc(live: LiveStack, channel, lines, read_first: bool) -> None:
    if read_first:
        live.stack.engine.hold_after(4)
    else:
        live.stack.engine.hold()
    call = stubs.GenerationStub(channel).GenerateStream(message(max_tokens=200), metadata=metadata())
    if read_first:
        await call.read()
    await live.stack.engine.submissions(1)
    call.cancel()
    (line,) = await lines()
    assert (line["status"], line["error"]) == ("CANCELLED", "aborted")
    assert (line["generated_tokens"] > 0) == read_first


async def test_a_grpc_deadline(live: LiveStack, channel, lines) -> None:
    live.stack.engine.hold()
    call = stubs.GenerationStub(channel).Generate(message(), metadata=metadata(), timeout=0.2)
    assert await code_of(call) is grpc.StatusCode.DEADLINE_EXCEEDED
    (line,) = await lines()
    assert (line["status"], line["error"]) == ("DEADLINE_EXCEEDED", "deadline_exceeded")


@pytest.mark.parametrize(("left_s", "status"), [(0.004, "DEADLINE_EXCEEDED"), (100.0, "CANCELLED")])
async def test_a_grpc_client_gives_up_before_its_deadline_which_was_rounded_up_on_the_way(
    left_s: float, status: str
) -> None:
    class Context:
        def time_remaining(self) -> float:
            return left_s

        def set_trailing_metadata(self, _: object) -> None: ...

    running = _Running(CallRecord())
    with pytest.raises(asyncio.CancelledError):
        async with running.handling(Context()):
            raise asyncio.CancelledError
    running.end()
    assert running.call.status == status


async def test_a_bug(live: LiveStack, channel, lines, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(live.stack.service.text, "encode", broken)
    assert (await post(live)).status_code == 500
    call = stubs.GenerationStub(channel).Generate(message(), metadata=metadata())
    assert await code_of(call) is grpc.StatusCode.INTERNAL
    told = await lines()
    assert [(line["status"], line["error"]) for line in told] == [(500, "internal"), ("INTERNAL", "internal")]


async def test_what_operators_do(live: LiveStack, channel, lines) -> None:
    folder = write_adapter(live.stack.root / "new", seed=5)
    body = {"lora_name": "new", "lora_path": str(folder)}
    assert (await post(live, body, secret="root", path="/v1/load_lora_adapter")).status_code == 200
    version = live.stack.registry.get("new").version
    stub = admin_stubs.AdapterAdminStub(channel)
    asked = admin.PinAdapterRequest(name="new", pinned=True), admin.UnloadAdapterRequest(name="none")
    assert await code_of(stub.PinAdapter(asked[0], metadata=metadata("root"))) is grpc.StatusCode.OK
    assert await code_of(stub.UnloadAdapter(asked[1], metadata=metadata("root"))) is grpc.StatusCode.NOT_FOUND
    told = await lines()
    assert [(line["route"].rpartition("/")[2], line["name"], line["key"]) for line in told] == [
        ("load_lora_adapter", "new", "root"), ("PinAdapter", "new", "root"), ("UnloadAdapter", "none", "root")
    ]  # fmt: skip
    assert told[0]["version"] == version


async def test_a_name_in_a_path_is_no_route(live: LiveStack, lines) -> None:
    async with live.http() as client:
        await client.get("/v1/models/one", headers=bearer("user"))
    (line,) = await lines()
    assert line["route"] == "GET /v1/models/{model:path}"


async def test_health_checks_are_for_those_who_debug(live: LiveStack, channel, lines, caplog) -> None:
    async def probe() -> None:
        async with live.http() as client:
            for path in ("/health", "/ready", "/metrics"):
                await client.get(path)
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())

    await probe()
    assert [(line["route"], line["error"]) for line in await lines()] == [("GET /metrics", "unauthenticated")]
    caplog.clear()
    live.stack.engine.status = "restarting"
    async with live.http() as client:
        assert (await client.get("/ready")).status_code == 503
    assert await lines() == []
    live.stack.engine.status = "ready"
    caplog.set_level(logging.DEBUG)
    await probe()
    assert [line["route"] for line in await lines()] == [
        "GET /health", "GET /ready", "GET /metrics", "grpc.health.v1.Health/Check"
    ]  # fmt: skip


async def test_prompts_and_answers_are_not_told(live: LiveStack, channel, lines, caplog) -> None:
    caplog.set_level(logging.DEBUG, "perseid_server")
    live.stack.says("an answer of ours")
    chat = {"model": "one", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 20}
    for told in (await post(live), await post(live, chat, path="/v1/chat/completions")):
        assert told.status_code == 200
    await post(live, BODY | {"temperature": SECRET})
    assert await code_of(stubs.GenerationStub(channel).Generate(message(), metadata=metadata())) is grpc.StatusCode.OK
    text = json.dumps(await lines()) + caplog.text
    assert SECRET not in text
    assert "an answer" not in text


async def test_prompts_and_answers_are_told_to_those_who_want_them(tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO)
    stack = make_stack(tmp_path / "other", calls=Calls(log_prompts=True))
    stack.says("an answer of ours")
    body = {"model": "tiny", "prompt": [SECRET, "b"], "max_tokens": 30}
    async with serving(stack) as live:
        assert (await post(live, body)).status_code == 200
    (line,) = (record.fields for record in caplog.records if record.name == "perseid_server.calls")
    assert line["prompts"] == [SECRET, "b"]
    assert line["answers"] == ["an answer of ours"] * 2

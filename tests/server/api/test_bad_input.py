"""Everything a client can get wrong is refused with a status, a message that names the field, and no traceback."""

import json
import re
from collections.abc import Iterator

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from tests.server.api.bad_input import ALL, Bad
from tests.server.stack import LiveStack, serving_in_thread

ROUTES = {False: "/v1/completions", True: "/v1/chat/completions"}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveStack]:
    """One server for all: bad input must leave nothing behind."""
    with serving_in_thread(tmp_path_factory.mktemp("server")) as live:
        yield live
        assert not live.stack.engine.engine.has_work


def error_of(response: httpx.Response) -> dict[str, str | None]:
    """The error object, which has OpenAI's four fields and tells nothing of our insides."""
    assert "Traceback" not in response.text
    assert "perseid_server" not in response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def named(case: Bad, message: str) -> bool:
    """Every alternative but one may be missing where transports name a thing differently."""
    return any(re.search(rf"(?<![a-z_]){re.escape(name)}(?![a-z_])", message) for name in case.names.split("|"))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("case", [case for case in ALL if case.http is not None], ids=str)
def test_http_refuses(http: httpx.Client, case: Bad, stream: bool) -> None:
    body = case.body() if "stream" in case.body() or "stream_options" in case.body() else case.body() | {
        "stream": stream
    }  # fmt: skip
    response = http.post(ROUTES[case.chat], content=json.dumps(body), headers={"Content-Type": "application/json"})
    error = error_of(response)
    assert (response.status_code, named(case, error["message"])) == (case.status, True), error
    assert len(error["message"]) < 2000


@pytest.mark.parametrize("case", [case for case in ALL if case.sampling or case.request is not None], ids=str)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_grpc_refuses(generation: stubs.GenerationStub, case: Bad, stream: bool) -> None:
    call = (lambda asked: list(generation.GenerateStream(asked))) if stream else generation.Generate
    with pytest.raises(grpc.RpcError) as refused:
        call(case.message())
    assert (refused.value.code(), named(case, refused.value.details())) == (case.code, True), refused.value.details()
    assert "Traceback" not in refused.value.details()


def test_grpc_names_the_field_in_its_details_too(generation: stubs.GenerationStub) -> None:
    case = next(case for case in ALL if case.name == "temperature below")
    with pytest.raises(grpc.RpcError) as refused:
        generation.Generate(case.message(), timeout=20)
    detail = error_details_pb2.BadRequest()
    assert rpc_status.from_call(refused.value).details[0].Unpack(detail)
    assert [violation.field for violation in detail.field_violations] == ["temperature"]


def test_http_names_the_field_as_param(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={"model": "tiny", "prompt": "hi", "stream": "yes"})
    assert error_of(response)["param"] == "stream"
    response = http.post("/v1/completions", json={"model": "nobody", "prompt": "hi"})
    assert {**error_of(response), "message": ""} == {
        "message": "", "type": "not_found_error", "param": "model", "code": "model_not_found"
    }  # fmt: skip


JSON = {"Content-Type": "application/json"}
GOOD = b'{"model": "tiny", "prompt": "hi", "max_tokens": 2'
RAW = {
    "nothing": (b"", JSON, 400),
    "not JSON": (b"{", JSON, 400),
    "not UTF-8": (GOOD + b', "user": "\xff"}', JSON, 400),
    "JSON array": (b"[]", JSON, 400),
    "JSON text": (b'"hi"', JSON, 400),
    "null": (b"null", JSON, 400),
    "too deep": (b"[" * 100_000, JSON, 400),
    "too many digits": (GOOD + b', "seed": ' + b"9" * 5000 + b"}", JSON, 400),
    "infinite": (GOOD + b', "temperature": 1e999}', JSON, 400),
    "text/plain": (GOOD + b"}", {"Content-Type": "text/plain"}, 400),
    "a form": (b"model=tiny", {"Content-Type": "application/x-www-form-urlencoded"}, 400),
    "no content type": (GOOD + b"}", {}, 400),
    "surrogate in the prompt": (b'{"model": "tiny", "prompt": "\\ud800"}', JSON, 400),
    "surrogate in the model": (b'{"model": "\\ud800", "prompt": "hi"}', JSON, 400),
    "surrogate in a stop": (GOOD + b', "stop": "\\ud800"}', JSON, 400),
    "surrogate in a field's name": (GOOD + b', "\\ud800": 1}', JSON, 400),
    "surrogate in a field's value": (GOOD + b', "unknown": "\\ud800"}', JSON, 400),
    "too large": (GOOD + b', "user": "' + b"x" * (16 << 20) + b'"}', JSON, 413),
}


@pytest.mark.parametrize("name", RAW)
def test_bodies_that_are_no_request_are_refused(http: httpx.Client, name: str) -> None:
    body, headers, status = RAW[name]
    response = http.post("/v1/completions", content=body, headers=headers)
    assert response.status_code == status, response.text[:300]
    error_of(response)


@pytest.mark.parametrize("message", [{"role": "\ud800"}, {"content": "\ud800"}, {"\ud800": "x"}], ids=ascii)
def test_conversations_with_lone_surrogates_are_refused(http: httpx.Client, message: dict[str, str]) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"} | message]}
    response = http.post("/v1/chat/completions", content=json.dumps(body), headers=JSON)
    assert response.status_code == 400
    assert error_of(response)["param"] == "messages"


@pytest.mark.parametrize("depth", [200, 500, 900, 990, 2000])
def test_nesting_of_any_depth_is_taken_or_refused(http: httpx.Client, depth: int) -> None:
    nested = "[" * depth + "]" * depth
    good = '{"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": "hi"}]'
    for field in ("user", "unknown", "messages", "chat_template_kwargs"):
        body = f'{good}, "{field}": {nested}}}'
        response = http.post("/v1/chat/completions", content=body, headers=JSON)
        assert response.status_code in {200, 400}, response.text[:300]


def test_a_body_that_grows_too_large_while_it_is_read_is_refused(http: httpx.Client) -> None:
    chunks = (b"x" * (1 << 20) for _ in range(20))
    response = http.post("/v1/completions", content=chunks, headers=JSON)
    assert response.status_code == 413
    assert "larger than 16777216 bytes" in error_of(response)["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/health", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/nobody", 404),
        ("GET", "/v1/models/../../etc/passwd", 404),
        ("GET", "/v1/models/a%00b", 404),
    ],
)
def test_unknown_routes_and_methods(http: httpx.Client, method: str, path: str, status: int) -> None:
    response = http.request(method, path)
    assert response.status_code == status
    error_of(response)


@pytest.mark.parametrize(
    ("path", "body", "status", "names"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, 400, "prompt"),
        ("/tokenize", {"prompt": 1}, 400, "prompt"),
        ("/detokenize", {"tokens": [258]}, 400, "tokens"),
        ("/detokenize", {"tokens": "x"}, 400, "tokens"),
        ("/v1/load_lora_adapter", {}, 400, "lora_name"),
        ("/v1/load_lora_adapter", {"lora_name": "../x", "lora_path": "x"}, 400, "lora_name"),
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/etc"}, 403, "lora_path"),
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "org/name"}, 403, "lora_path"),
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": ""}, 400, "lora_path"),
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "a\0b"}, 400, "lora_path"),
        ("/v1/load_lora_adapter", {"lora_name": "x" * 5000, "lora_path": "a"}, 400, "lora_name"),
        ("/v1/unload_lora_adapter", {"lora_name": "nobody"}, 404, "nobody"),
    ],
)
def test_other_routes_refuse_too(http: httpx.Client, path: str, body: dict, status: int, names: str) -> None:
    response = http.post(path, json=body)
    assert response.status_code == status
    assert names in error_of(response)["message"]


def test_a_message_too_large_for_grpc_is_refused(live: LiveStack) -> None:
    case = Bad("huge", "", request={"prompt": "x" * (17 << 20)})
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(live.grpc, options) as channel, pytest.raises(grpc.RpcError) as refused:
        stubs.GenerationStub(channel).Generate(case.message(), timeout=20)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_errors_are_answered_without_a_thread(live: LiveStack, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a thread for an error's words")

    monkeypatch.setattr("starlette._exception_handler.run_in_threadpool", refuse)
    transport = httpx.ASGITransport(live.stack.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answers = [
            await client.post("/v1/completions", json={"model": "nobody", "prompt": "x"}),
            await client.post("/v1/completions", json={}),
            await client.get("/v1/completions"),
        ]
    assert [answer.status_code for answer in answers] == [404, 400, 405]

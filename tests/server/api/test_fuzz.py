"""Whatever a client sends is answered or refused: never an internal error."""

import json
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from perseid_server.api.http.schemas import ChatBody, CompletionBody
from tests.server.stack import LiveStack, serving_in_thread

SCALARS = (
    st.none() | st.booleans() | st.integers(-3, 300) | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["\ud800", "user", "text", "tiny", "one", "1", "none", 2**64, -(2**63), 1e308])
)  # fmt: skip
KEYS = st.sampled_from(["role", "content", "type", "text", "1", "257", "name", "messages"]) | st.text(max_size=3)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))
FIELDS = [*sorted({*CompletionBody.model_fields, *ChatBody.model_fields} - {"n"}), "unknown", "user", "tools"]
MESSAGES = st.lists(st.fixed_dictionaries({"role": VALUES, "content": VALUES}), max_size=2)
ANSWERED = {200, 400, 404}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveStack]:
    with serving_in_thread(tmp_path_factory.mktemp("server"), "one") as live:
        yield live
        assert not live.stack.engine.engine.has_work


def post(http: httpx.Client, path: str, body: object) -> httpx.Response:
    return http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3))
def test_completions(http: httpx.Client, fields: dict[str, Any]) -> None:
    body = {"model": "tiny", "prompt": "a", "max_tokens": 2} | fields
    assert post(http, "/v1/completions", body).status_code in ANSWERED


@settings(max_examples=150)
@given(MESSAGES | VALUES, st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=2))
def test_conversations(http: httpx.Client, messages: Any, fields: dict[str, Any]) -> None:
    body = {"model": "tiny", "max_tokens": 2, "messages": messages} | fields
    assert post(http, "/v1/chat/completions", body).status_code in ANSWERED


@settings(max_examples=100)
@given(
    st.sampled_from(["/tokenize", "/detokenize", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"]),
    st.dictionaries(st.sampled_from(["prompt", "messages", "tokens", "lora_name", "lora_path"]), VALUES) | VALUES,
)
def test_other_routes(http: httpx.Client, path: str, body: Any) -> None:
    assert post(http, path, body).status_code in ANSWERED | {403}


NUMBERS = st.integers(0, 2**32 - 1)
FLOATS = st.floats(width=32)
SAMPLING = st.fixed_dictionaries(
    {"max_tokens": st.integers(0, 3)},
    optional={
        "temperature": FLOATS, "top_p": FLOATS, "min_p": FLOATS, "repetition_penalty": FLOATS, "top_k": NUMBERS,
        "presence_penalty": FLOATS, "seed": st.integers(0, 2**64 - 1), "min_tokens": st.integers(0, 4), "n": NUMBERS,
        "logprobs": st.integers(0, 25), "stop": st.lists(st.text(max_size=3), max_size=3), "echo": st.booleans(),
        "stop_token_ids": st.lists(NUMBERS, max_size=2), "logit_bias": st.dictionaries(NUMBERS, FLOATS, max_size=2),
    },
)  # fmt: skip


@settings(max_examples=150)
@given(SAMPLING, st.text(max_size=5), st.sampled_from(["", "one", "tiny"]) | st.text(max_size=3))
def test_grpc(generation: stubs.GenerationStub, sampling: dict[str, Any], prompt: str, adapter: str) -> None:
    asked = pb.GenerateRequest(prompt=prompt, adapter=adapter, sampling=pb.SamplingParams(**sampling))
    code = outcome(generation, asked)
    assert code in {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}


def outcome(generation: stubs.GenerationStub, asked: pb.GenerateRequest) -> grpc.StatusCode:
    """The status of a call."""
    try:
        generation.Generate(asked, timeout=20)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK

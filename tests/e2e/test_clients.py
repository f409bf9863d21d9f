"""Proof 5: real clients, unchanged: openai, grpcio with reflection only, buf curl, promtool."""

import json
import subprocess
from pathlib import Path

import grpc
import openai
import pytest
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.e2e.running import RunningServer
from tests.tools import require_tool

BASE = "SmolLM2-135M-Instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    """The official client, pointed at the server."""
    return openai.OpenAI(base_url=f"{server.http}/v1", api_key="unused", max_retries=0)


def test_openai_lists_the_base_first_then_the_adapters(client: openai.OpenAI, adapter_folders: dict[str, Path]) -> None:
    names = [model.id for model in client.models.list()]
    assert names[0] == BASE
    assert set(names[1:]) >= set(adapter_folders)


def test_openai_chat_answers_and_streams_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=BASE, messages=QUESTION, temperature=0, max_tokens=20)
    assert whole.choices[0].message.content == "The capital of France is Paris."
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.completion_tokens in {7, 8}  # with or without the end token

    stream = client.chat.completions.create(
        model=BASE,
        messages=QUESTION,
        temperature=0,
        max_tokens=20,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_openai_completions_with_logprobs_and_several_choices(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=BASE, prompt="One, two, three,", max_tokens=6, temperature=0.8, seed=7, n=2, logprobs=3
    )
    again = client.completions.create(
        model=BASE, prompt="One, two, three,", max_tokens=6, temperature=0.8, seed=7, n=2, logprobs=3
    )
    assert [choice.text for choice in answer.choices] == [choice.text for choice in again.choices]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert "".join(choice.logprobs.tokens) == choice.text
        assert all(value <= 0 for value in choice.logprobs.token_logprobs)


def test_openai_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="nobody", messages=QUESTION)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=BASE, messages=QUESTION, temperature=-1)
    assert bad.value.param == "temperature"


def test_a_client_that_knows_only_reflection_generates(server: RunningServer) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        method = pool.FindServiceByName("perseid.v1.Generation").FindMethodByName("Generate")
        request_class = message_factory.GetMessageClass(method.input_type)
        response_class = message_factory.GetMessageClass(method.output_type)
        call = channel.unary_unary(
            "/perseid.v1.Generation/Generate", request_class.SerializeToString, response_class.FromString
        )
        request = json_format.ParseDict(
            {"prompt": "The capital of France is", "sampling": {"maxTokens": 3, "temperature": 0}}, request_class()
        )
        answer = json_format.MessageToDict(call(request, timeout=60))
    assert "Paris" in answer["choices"][0]["text"]


def test_buf_curl_generates_through_reflection(server: RunningServer) -> None:
    buf = require_tool("buf", "pip install buf-bin")
    request = {"prompt": "The capital of France is", "sampling": {"max_tokens": 3, "temperature": 0}}
    url = f"http://{server.grpc}/perseid.v1.Generation/Generate"
    done = subprocess.run(
        [buf, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--data", json.dumps(request), url],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in json.loads(done.stdout)["choices"][0]["text"]


def test_metrics_are_clean_for_promtool_and_tell_the_truth(server: RunningServer) -> None:
    promtool = require_tool("promtool", "Debian package prometheus")
    done = subprocess.run(
        [promtool, "check", "metrics"], input=server.metrics(), capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # 106 M 4-bit weights with a scale and an offset per 32, 28 M 8-bit embeddings: between 80 and 125 MB.
    assert 80e6 < server.metric("perseid_model_weight_bytes") < 125e6

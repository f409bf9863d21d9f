"""Proof 6: the table of bad input on the real base, over both transports, and adapters that must not be accepted."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import httpx
import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from perseid_protos.perseid.v1 import adapter_admin_pb2 as admin
from perseid_protos.perseid.v1 import adapter_admin_pb2_grpc as admin_stubs
from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from tests.e2e.client import Job, Streams, generate
from tests.e2e.running import RunningServer, running_server
from tests.server.api.bad_input import ALL, Bad, both

BASE = "SmolLM2-135M-Instruct"
VOCABULARY = 49152
CONTEXT = 8192

OF_THE_TINY_BASE = {
    "top_k beyond the vocabulary", "stop token out of vocabulary", "bias out of vocabulary", "token out of vocabulary",
    "prompt longer than the context", "max_tokens beyond the context", "unknown role", "unknown role of a huge name",
    "no role",
}  # fmt: skip

OF_THIS_BASE = [
    both("top_k beyond the vocabulary", "top_k", top_k=VOCABULARY + 1),
    both("stop token out of vocabulary", "stop_token_ids", stop_token_ids=[VOCABULARY]),
    both("max_tokens beyond the context", str(CONTEXT), max_tokens=CONTEXT),
    Bad("bias out of vocabulary", "logit_bias", {"logit_bias": {"49152": 1.0}}, {"logit_bias": {VOCABULARY: 1.0}}),
    Bad(
        "token out of vocabulary", "prompt", {"prompt": [VOCABULARY]},
        request={"token_ids": pb.TokenIds(ids=[VOCABULARY])},
    ),
    Bad(
        "prompt longer than the context", f"{CONTEXT + 8} tokens", {"prompt": [504] * (CONTEXT + 8)},
        request={"token_ids": pb.TokenIds(ids=[504] * (CONTEXT + 8))},
    ),
]  # fmt: skip

TABLE = [case for case in ALL if case.name not in OF_THE_TINY_BASE] + OF_THIS_BASE


def names_it(case: Bad, message: str) -> bool:
    return any(name in message for name in case.names.split("|"))


def test_http_refuses_with_a_message_that_names_the_field(server: RunningServer) -> None:
    with httpx.Client(base_url=server.http, timeout=30) as client:
        for case in TABLE:
            if case.http is None:
                continue
            body = case.body()
            body["model"] = body["model"].replace("tiny", BASE) if isinstance(body["model"], str) else body["model"]
            route = "/v1/chat/completions" if case.chat else "/v1/completions"
            response = client.post(route, content=json.dumps(body), headers={"Content-Type": "application/json"})
            error = response.json()["error"]
            assert (response.status_code, names_it(case, error["message"])) == (case.status, True), (case.name, error)
            assert "Traceback" not in response.text


def test_grpc_refuses_with_a_message_that_names_the_field(server: RunningServer) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        generation = stubs.GenerationStub(channel)
        for case in TABLE:
            if case.sampling is None and case.request is None:
                continue
            with pytest.raises(grpc.RpcError) as refused:
                generation.Generate(case.message(), timeout=30)
            told = (refused.value.code(), names_it(case, refused.value.details()))
            assert told == (case.code, True), (case.name, refused.value.details())


def test_the_server_still_answers(server: RunningServer, prompts: list[tuple[int, ...]]) -> None:
    assert len(generate(server.grpc, Job(prompts[0], None, 3)).choices[0].token_ids) == 3
    assert server.metric("perseid_num_requests_running") == 0


def test_a_full_queue_says_when_to_come_again(prompts: list[tuple[int, ...]], tmp_path: Path) -> None:
    with running_server("--max-queue", "2", store=tmp_path / "store") as server:
        streams = Streams(server.grpc, [Job(prompts[i], None, 400) for i in range(2)])
        while not streams.all_started():
            assert not streams.any_ended()
        client = openai.OpenAI(base_url=f"{server.http}/v1", api_key="unused", max_retries=0)
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model=BASE, prompt="hi", max_tokens=1)
        assert int(refused.value.response.headers["Retry-After"]) >= 1
        with pytest.raises(grpc.RpcError) as exhausted:
            generate(server.grpc, Job(prompts[2], None, 1))
        assert exhausted.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert all(len(tokens) == 400 for tokens in streams.results())
        streams.close()


# --- adapters that must not be accepted ------------------------------------------------------------------------------

Tensors = dict[str, torch.Tensor]
Config = dict[str, object]
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


def without_b(tensors: Tensors, config: Config) -> None:
    del tensors[f"{PREFIX}.lora_B.weight"]


def wider(tensors: Tensors, config: Config) -> None:
    for name in tensors:
        if "lora_A" in name:
            tensors[name] = torch.ones(tensors[name].shape[0], 640)


def with_nan(tensors: Tensors, config: Config) -> None:
    tensors[f"{PREFIX}.lora_A.weight"][0, 0] = float("nan")


def with_infinity(tensors: Tensors, config: Config) -> None:
    tensors[f"{PREFIX}.lora_B.weight"][0, 0] = float("inf")


def with_a_stranger(tensors: Tensors, config: Config) -> None:
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight"] = torch.ones(4, 4)


def of_gpt2(tensors: Tensors, config: Config) -> None:
    tensors.clear()
    tensors["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"] = torch.ones(4, 576)
    tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"] = torch.ones(1728, 4)
    config["target_modules"] = ["c_attn"]


def another_rank(tensors: Tensors, config: Config) -> None:
    config["r"] = 5


def dora(tensors: Tensors, config: Config) -> None:
    config["use_dora"] = True


def saved_modules(tensors: Tensors, config: Config) -> None:
    config["modules_to_save"] = ["lm_head"]


def ia3(tensors: Tensors, config: Config) -> None:
    config["peft_type"] = "IA3"


REFUSED: list[tuple[Callable[[Tensors, Config], None], str]] = [
    (without_b, "lora_B"),
    (wider, "640"),
    (with_nan, "NaN"),
    (with_infinity, "Inf"),
    (with_a_stranger, "lora_C"),
    (of_gpt2, "c_attn"),
    (another_rank, "rank"),
    (dora, "use_dora"),
    (saved_modules, "modules_to_save"),
    (ia3, "IA3"),
]


@pytest.fixture(scope="module")
def bad_root(adapter_folders: dict[str, Path]) -> Path:
    """Where the server under test lets clients load from."""
    return adapter_folders["r4-qv"].parent


@pytest.fixture
def broken(bad_root: Path, adapter_folders: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[Path]:
    """A good adapter, spoilt in one way."""
    folder = bad_root / f"broken-{request.param.__name__}"
    folder.mkdir()
    good = adapter_folders["r4-qv"]
    tensors = load_file(good / "adapter_model.safetensors")
    config = json.loads((good / "adapter_config.json").read_text())
    request.param(tensors, config)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    yield folder
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


@pytest.mark.parametrize(
    ("broken", "names"), REFUSED, indirect=["broken"], ids=lambda value: getattr(value, "__name__", "")
)
def test_a_broken_adapter_is_refused_and_serves_nobody(server: RunningServer, broken: Path, names: str) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        stub = admin_stubs.AdapterAdminStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.LoadAdapter(admin.LoadAdapterRequest(name="broken", source=str(broken)), timeout=30)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert names in refused.value.details()
    answer = httpx.post(f"{server.http}/v1/load_lora_adapter", json={"lora_name": "broken", "lora_path": str(broken)})
    assert answer.status_code == 400
    assert names in answer.json()["error"]["message"]
    with pytest.raises(grpc.RpcError) as unknown:
        generate(server.grpc, replace(Job((504,), None, 1), adapter="broken"))
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("source", ["/etc", "../../etc", "org/name", "https://example.org/adapter", "a\0b", "~"])
def test_a_client_may_not_name_what_the_operator_did_not_allow(server: RunningServer, source: str) -> None:
    answer = httpx.post(f"{server.http}/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": source})
    assert answer.status_code in {400, 403}
    told = answer.json()["error"]
    assert (told["param"], told["message"].startswith("lora_path")) == ("lora_path", True)

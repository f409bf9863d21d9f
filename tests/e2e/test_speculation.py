"""Proof: drafts change nothing. 200 prompts by the base, by eight adapters, by gates and by a blend, drafted for by the
heads that ship and by prompt lookup, say token by token what they say without; over the wire too, while heads come and
go.

The adapters and gates are random, as in the other proofs: the heads were trained for none of them, so drafts are right
sometimes, which is what this is about.
"""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from perseid_protos.perseid.v1 import adapter_admin_pb2 as admin
from perseid_protos.perseid.v1 import adapter_admin_pb2_grpc as admin_stubs
from perseid_server.adapters.store import version_of
from perseid_server.engine.adaptation import BASE, BASE_COLUMN, Adaptation, Routing
from perseid_server.engine.build import build_engine
from perseid_server.engine.config import EngineConfig
from perseid_server.engine.engine import Engine
from perseid_server.engine.messages import SequenceOutput, Submit
from perseid_server.frontend.requests import ChatInput
from perseid_server.frontend.text import TextProcessor
from perseid_server.model.sampling_params import SamplingParams
from perseid_server.model.source import resolve_model
from perseid_server.model.tokenizer import export_tokenizer
from perseid_server.speculation.options import OFF, Speculation
from tests.e2e.random_gates import write_gates
from tests.e2e.running import RunningServer, running_server

ROOT = Path(__file__).parents[2]
HEADS = ROOT / "examples" / "heads" / "base"
CHATS = ROOT / "router" / "perseid_router" / "training"
NUM_PROMPTS = 200
NUM_TOKENS = 10
DRAFTED = Speculation("auto", "heads")


@pytest.fixture(scope="module")
def chats(base_gguf: Path) -> list[tuple[int, ...]]:
    """Chat prompts as serving renders them."""
    source = resolve_model(str(base_gguf))
    text = TextProcessor(export_tokenizer(source), 1 << 20)
    lines = [line for name in ("generic_held_out", "generic") for line in (CHATS / f"{name}.jsonl").open()]
    messages = [({"role": "user", "content": json.loads(line)["prompt"]},) for line in lines[:NUM_PROMPTS]]
    return [
        tuple(text.tokenizer.encode(text.render(ChatInput(each)), add_special_tokens=False).ids) for each in messages
    ]


@pytest.fixture(scope="module")
def versions(adapter_folders: dict[str, Path]) -> dict[str, str]:
    return {name: version_of(folder) for name, folder in adapter_folders.items()}


@pytest.fixture(scope="module")
def engine(
    adapter_folders: dict[str, Path], versions: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Engine:
    """Three drafted tokens for each sequence and step, whether they pay or not."""
    engine = build_engine(EngineConfig(draft_tokens=3, max_num_seqs=32)).engine
    for name, folder in adapter_folders.items():
        engine.register_adapter(versions[name], str(folder), pinned=True)
    gates = write_gates(tmp_path_factory.mktemp("gates") / "all", versions, null=True)
    engine.register_gate_set("gates", str(gates), tuple(versions.values()), null=True, pinned=True)
    engine.register_heads("heads", str(HEADS))
    while engine.is_loading:
        engine.step()
        time.sleep(0.001)
    assert engine.adapter_state("heads").location == "device"
    return engine


def kinds(versions: dict[str, str]) -> dict[str, Adaptation]:
    columns = (*versions.values(), BASE_COLUMN)
    first, second = list(versions.values())[:2]
    return {
        "base": BASE,
        **{name: Adaptation.of(version) for name, version in versions.items()},
        "auto": Adaptation(routing=Routing("gates", columns, 2, 1.0)),
        "blend": Adaptation(((first, 0.5), (second, 0.5))),
    }


def run(engine: Engine, requests: list[Submit]) -> list[list[SequenceOutput]]:
    outputs: dict[str, list[SequenceOutput]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        for output in engine.step().outputs:
            assert output.error is None
            outputs[output.request_id].append(output)
    return list(outputs.values())


def answer(outputs: list[SequenceOutput]) -> tuple[object, ...]:
    last = outputs[-1]
    return *(token for output in outputs for token in output.token_ids), last.finish_reason, last.stop_token_id


def accepted(outputs: list[SequenceOutput]) -> int:
    return sum(output.accepted_tokens for output in outputs)


def test_greedy_answers_of_every_kind_are_those_without_drafts(
    engine: Engine, versions: dict[str, str], chats: list[tuple[int, ...]]
) -> None:
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
    jobs = [
        Submit(f"{name} {place}", prompt, sampling, adaptation, speculation=DRAFTED)
        for place, prompt in enumerate(chats)
        for name, adaptation in kinds(versions).items()
    ]
    plain = run(engine, [replace(job, speculation=OFF) for job in jobs])
    drafted = run(engine, jobs)
    assert len(jobs) == NUM_PROMPTS * 11
    differing = [
        job.request_id for job, ours, theirs in zip(jobs, drafted, plain, strict=True) if answer(ours) != answer(theirs)
    ]
    assert differing == []
    of_kind = {name: sum(map(accepted, drafted[place::11])) for place, name in enumerate(kinds(versions))}
    assert min(of_kind.values()) > 20, of_kind
    assert sum(map(accepted, plain)) == 0


def test_sampled_answers_with_a_seed_are_those_without_drafts(
    engine: Engine, versions: dict[str, str], chats: list[tuple[int, ...]]
) -> None:
    sampling = SamplingParams(max_tokens=24, temperature=0.8, top_p=0.9, repetition_penalty=1.1, logprobs=2)
    jobs = [
        Submit(f"{name} {place}", chats[place], replace(sampling, seed=place), adaptation, speculation=DRAFTED)
        for place in range(3)
        for name, adaptation in kinds(versions).items()
    ]
    drafted, plain = run(engine, jobs), run(engine, [replace(job, speculation=OFF) for job in jobs])
    for ours, theirs in zip(drafted, plain, strict=True):
        assert answer(ours) == answer(theirs)
        assert [each for output in ours for each in output.logprobs] == [
            each for output in theirs for each in output.logprobs
        ]
    assert sum(map(accepted, drafted)) > 20


# --- over the wire ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drafting_server(
    adapter_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    store = tmp_path_factory.mktemp("speculation") / "store"
    adapter = adapter_folders["r16-all"]
    arguments = [f"--adapter=r16-all={adapter}", f"--adapter=medusa={HEADS}", "--adapter-root", str(HEADS.parent)]
    with running_server(*arguments, "--draft-tokens", "4", store=store) as running:
        yield running


def ask(server: RunningServer, model: str | None = None, **fields: Any) -> dict[str, Any]:
    base = httpx.get(f"{server.http}/v1/models").json()["data"][0]["id"]
    body = {"messages": [{"role": "user", "content": "Tell me about the sea."}], "temperature": 0, "max_tokens": 60}
    reply = httpx.post(f"{server.http}/v1/chat/completions", json=body | {"model": model or base} | fields, timeout=120)
    return reply.raise_for_status().json()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"model": "r16-all"},
        {"stop": ["the s", "wave"]},
        {"n": 3, "temperature": 0.9, "seed": 5},
        {"logprobs": True, "top_logprobs": 2, "max_tokens": 30},
        {"frequency_penalty": 0.5, "presence_penalty": 0.3},
        {"max_tokens": 7},
    ],
    ids=["plain", "adapter", "stop", "n", "logprobs", "penalties", "short"],
)
def test_http_answers_are_those_without_drafts(drafting_server: RunningServer, fields: dict[str, Any]) -> None:
    plain = ask(drafting_server, **fields, speculation="off")
    for mode in ("auto", "medusa", "ngram"):
        drafted = ask(drafting_server, **fields, speculation=mode)
        assert drafted["choices"] == plain["choices"]
        assert drafted["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]
        details = drafted["usage"]["completion_tokens_details"]
        checked = details["accepted_prediction_tokens"] + details["rejected_prediction_tokens"]
        assert checked > 0 or mode == "ngram", "a short answer may repeat nothing"
    assert plain["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] == 0


def test_heads_come_and_go_while_requests_run(drafting_server: RunningServer) -> None:
    """Ten times unloaded and loaded again under four requests at a time: no answer changes, none is lost."""
    plain = ask(drafting_server, max_tokens=120, speculation="off")["choices"]
    with grpc.insecure_channel(drafting_server.grpc) as channel, ThreadPoolExecutor(4) as pool:
        stub = admin_stubs.AdapterAdminStub(channel)
        asked = [pool.submit(ask, drafting_server, max_tokens=120, speculation="auto") for _ in range(24)]
        for _ in range(10):
            stub.UnloadAdapter(admin.UnloadAdapterRequest(name="medusa"))
            time.sleep(0.05)
            stub.LoadAdapter(admin.LoadAdapterRequest(name="medusa", source=str(HEADS)))
            time.sleep(0.1)
        answers = [each.result()["choices"] for each in asked]
    assert answers == [plain] * 24
    assert drafting_server.metric("perseid_spec_decode_num_accepted_tokens_total") > 0

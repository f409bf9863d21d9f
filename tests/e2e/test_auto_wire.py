"""Proof: `auto` and blends over the wire, among other requests, while adapters come and go and servers die."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest

from perseid_protos.perseid.v1 import adapter_admin_pb2 as admin
from perseid_protos.perseid.v1 import adapter_admin_pb2_grpc as admin_stubs
from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from perseid_router.gate_set import Column, Gate, GateSet, GateSetConfig
from perseid_server.adapters.store import version_of
from tests.e2e.reference import RECIPES
from tests.e2e.running import RunningServer, running_server, start_server, stop_server

FIRST, SECOND, THIRD, OTHER = (recipe.name for recipe in RECIPES[2:6])
WIDTHS = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), 576) | {"down_proj": 1536}
STREAM_TOKENS = 150  # enough to still run when the changes are over


@pytest.fixture(scope="module")
def gates(adapter_folders: dict[str, Path]) -> Path:
    """Random gates for three adapters and the base, below the adapter root."""
    columns = tuple(Column(name, version_of(adapter_folders[name])) for name in (FIRST, SECOND, THIRD))
    random = np.random.default_rng(4)

    def gate(width: int) -> Gate:
        return Gate((3 * random.standard_normal((4, width)) / width**0.5).astype(np.float32), np.zeros(4, np.float32))

    of_layers = {(layer, name): gate(width) for layer in range(30) for name, width in WIDTHS.items()}
    folder = adapter_folders[FIRST].parent / "gates"
    GateSet(GateSetConfig(columns, base="SmolLM2-135M-Instruct"), of_layers).write(folder)
    return folder


@pytest.fixture
def own_server(adapter_folders: dict[str, Path], gates: Path, tmp_path: Path) -> Iterator[RunningServer]:
    """A server of a test's own, in whose store everything is: names change meaning here."""
    with running_server(*options(adapter_folders, gates), store=tmp_path / "store") as running:
        yield running


def options(adapter_folders: dict[str, Path], gates: Path) -> list[str]:
    named = [f"--adapter={name}={adapter_folders[name]}" for name in (FIRST, SECOND, THIRD, OTHER)]
    return [*named, f"--adapter=gates={gates}", "--adapter-root", str(gates.parent)]


def request(prompt: tuple[int, ...], num_tokens: int, **adaptation: object) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, logprobs=0)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling, **adaptation)  # type: ignore[arg-type]


def ask(server: RunningServer, asked: pb.GenerateRequest) -> list[tuple[int, float]]:
    """Tokens of an answer and their log-probabilities."""
    with grpc.insecure_channel(server.grpc) as channel:
        told = stubs.GenerationStub(channel).Generate(asked, timeout=120)
    return [(each.token_id, each.logprob) for each in told.choices[0].logprobs]


def at_once(server: RunningServer, asked: list[pb.GenerateRequest]) -> list[list[tuple[int, float]]]:
    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(lambda one: ask(server, one), asked))


def test_identities_hold_over_the_wire_among_other_requests(
    own_server: RunningServer, prompts: list[tuple[int, ...]]
) -> None:
    """One adapter that may be chosen ≡ that adapter; blend {a: 1} ≡ a; auto and blends alone ≡ the same in a batch."""
    prompt = prompts[0]
    only = pb.Auto(allow=[SECOND], null=False, tier=pb.TIER_TOKEN)
    of_one = pb.Blend(adapters=[pb.WeightedAdapter(name=SECOND, weight=1.0)])
    of_two = pb.Blend(
        adapters=[pb.WeightedAdapter(name=FIRST, weight=0.7), pb.WeightedAdapter(name=OTHER, weight=-0.4)]
    )
    asked = [
        request(prompt, 16, adapter=SECOND),
        request(prompt, 16, auto=only),
        request(prompt, 16, blend=of_one),
        request(prompt, 16, auto=pb.Auto()),
        request(prompt, 16, auto=pb.Auto(join=True)),
        request(prompt, 16, blend=of_two),
        request(prompt, 16),
    ]
    together = at_once(own_server, asked)
    assert together[0] == together[1] == together[2]
    assert len({tuple(answer) for answer in together}) == 5, "the others have an answer of their own each"
    assert [ask(own_server, one) for one in asked] == together


def test_auto_streams_end_on_what_they_began_with(
    own_server: RunningServer, adapter_folders: dict[str, Path], prompts: list[tuple[int, ...]]
) -> None:
    """While they run one adapter is replaced, one unloaded, and the gate set too; new requests see that."""
    adaptations: list[dict[str, object]] = [
        {"auto": pb.Auto()}, {"auto": pb.Auto(join=True)}, {"auto": pb.Auto(k=1)}, {"adapter": FIRST}, {},
        {"blend": pb.Blend(adapters=[pb.WeightedAdapter(name=name, weight=0.5) for name in (FIRST, SECOND)])},
    ]  # fmt: skip
    asked = [request(prompts[i], STREAM_TOKENS, **each) for i, each in enumerate(adaptations)]
    undisturbed = at_once(own_server, asked)
    with grpc.insecure_channel(own_server.grpc) as channel:
        streams = [stubs.GenerationStub(channel).GenerateStream(one, timeout=300) for one in asked]
        begun = [[next(stream)] for stream in streams]
        stub = admin_stubs.AdapterAdminStub(channel)
        other = str(adapter_folders[OTHER])
        stub.LoadAdapter(admin.LoadAdapterRequest(name=FIRST, source=other, replace=True), timeout=60)
        stub.UnloadAdapter(admin.UnloadAdapterRequest(name=SECOND), timeout=60)
        columns = stub.GetAdapter(admin.GetAdapterRequest(name="gates")).adapter.gate_set.columns
        assert [column.loaded for column in columns] == [False, False, True]
        with pytest.raises(grpc.RpcError) as refused:
            ask(own_server, request(prompts[0], 4, auto=pb.Auto(allow=[FIRST, SECOND])))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert f"'{FIRST}' has been replaced" in refused.value.details()
        assert f"'{SECOND}' is not loaded" in refused.value.details()
        masked = ask(own_server, request(prompts[0], 16, auto=pb.Auto(null=False, tier=pb.TIER_TOKEN)))
        assert masked == ask(own_server, request(prompts[0], 16, adapter=THIRD)), "one is left"
        stub.UnloadAdapter(admin.UnloadAdapterRequest(name="gates"), timeout=60)
        assert own_server.metric("perseid_num_requests_running") == len(asked), "ended too early: this proves nothing"
        answers = [[*first, *stream] for first, stream in zip(begun, streams, strict=True)]
    told = [[(each.token_id, each.logprob) for chunk in answer for each in chunk.logprobs] for answer in answers]
    assert told == undisturbed


def test_a_killed_server_serves_the_same_gate_set_after_a_restart(
    adapter_folders: dict[str, Path], gates: Path, prompts: list[tuple[int, ...]], tmp_path: Path
) -> None:
    asked = [request(prompts[1], 12, auto=auto) for auto in (pb.Auto(), pb.Auto(gate_set="gates", join=True))]
    server = start_server(*options(adapter_folders, gates), store=tmp_path / "store")
    try:
        server.wait_until_ready()
        before = at_once(server, asked)
        os.kill(server.engine_pid(), signal.SIGKILL)
        while server.is_ready():
            pass
        server.wait_until_ready()
        assert at_once(server, asked) == before, "a new engine knows the gate set"
        server.process.kill()
        server.process.wait()
    finally:
        stop_server(server)
    with running_server(store=tmp_path / "store") as again:
        assert at_once(again, asked) == before

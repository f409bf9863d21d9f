"""Proof: `auto` and blends over the wire, beside explicit and base requests, while adapters come and go."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from perseid_protos.perseid.v1 import adapter_admin_pb2 as admin
from perseid_protos.perseid.v1 import adapter_admin_pb2_grpc as admin_stubs
from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_server.adapters.store import version_of
from tests.e2e.client import Job, Streams, generate, generate_all, tokens_of
from tests.e2e.random_gates import write_gates
from tests.e2e.running import RunningServer, running_server, start_server, stop_server

STREAM_TOKENS = 160  # enough to still run when the swap is over
PROBE_TOKENS = 16
SWAPPED, STEADY, OTHER = "r16-all", "r17-mlp", "r1-all"


@pytest.fixture
def arguments(adapter_folders: dict[str, Path], tmp_path: Path) -> list[str]:
    """Two adapters, a gate set over them, and a folder with others."""
    columns = {name: version_of(adapter_folders[name]) for name in (SWAPPED, STEADY)}
    gates = write_gates(tmp_path / "gates", columns, null=True)
    named = [f"--adapter={name}={adapter_folders[name]}" for name in columns]
    return [*named, f"--adapter=gates={gates}", "--adapter-root", str(adapter_folders[OTHER].parent)]


@pytest.fixture
def own_server(arguments: list[str], tmp_path: Path) -> Iterator[RunningServer]:
    """A server of this test's own: names change meaning here."""
    with running_server(*arguments, store=tmp_path / "store") as running:
        yield running


def of_kinds(prompts: list[tuple[int, ...]], num_tokens: int) -> list[Job]:
    kinds = [
        pb.Auto(gate_set="gates"),
        pb.Auto(k=1, temperature=2.0),
        pb.Blend(adapters=[pb.WeightedAdapter(name=SWAPPED, weight=0.5), pb.WeightedAdapter(name=STEADY, weight=0.5)]),
        SWAPPED,
        None,
        pb.Auto(allow=[STEADY], null=False),
        pb.Auto(),
        STEADY,
    ]
    return [Job(prompts[i], kind, num_tokens) for i, kind in enumerate(kinds)]


def test_alone_and_together(own_server: RunningServer, prompts: list[tuple[int, ...]]) -> None:
    jobs = of_kinds(prompts[4:], 40)
    alone = [tokens_of(generate(own_server.grpc, job)) for job in jobs]
    assert [tokens_of(response) for response in generate_all(own_server.grpc, jobs)] == alone
    assert alone[5] == tokens_of(generate(own_server.grpc, replace(jobs[5], adapter=STEADY))), "a forced label"
    base = [tokens_of(generate(own_server.grpc, replace(job, adapter=None))) for job in jobs]
    assert sum(one != other for one, other in zip(alone, base, strict=True)) >= 5, "adapters act"
    whole = pb.Blend(adapters=[pb.WeightedAdapter(name=STEADY, weight=1.0), pb.WeightedAdapter(name=SWAPPED, weight=0)])
    assert tokens_of(generate(own_server.grpc, replace(jobs[7], adapter=whole))) == alone[7]


def test_streams_end_on_the_versions_they_began_with(
    own_server: RunningServer, adapter_folders: dict[str, Path], prompts: list[tuple[int, ...]]
) -> None:
    jobs = of_kinds(prompts, STREAM_TOKENS) * 2
    undisturbed = [tokens_of(response) for response in generate_all(own_server.grpc, jobs)]
    streams = Streams(own_server.grpc, jobs)
    deadline = time.monotonic() + 60
    while not streams.all_started():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with grpc.insecure_channel(own_server.grpc) as channel:
        stub = admin_stubs.AdapterAdminStub(channel)
        other = str(adapter_folders[OTHER])
        stub.LoadAdapter(admin.LoadAdapterRequest(name=SWAPPED, source=other, replace=True), timeout=60)
        # The gates know another version: its column is masked, also where it is named.
        masked = tokens_of(generate(own_server.grpc, Job(prompts[0], pb.Auto(), PROBE_TOKENS)))
        with pytest.raises(grpc.RpcError, match="another version") as refused:
            generate(own_server.grpc, Job(prompts[0], pb.Auto(allow=[SWAPPED]), PROBE_TOKENS))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        stub.UnloadAdapter(admin.UnloadAdapterRequest(name="gates"), timeout=60)
        with pytest.raises(grpc.RpcError) as refused:
            generate(own_server.grpc, Job(prompts[0], pb.Auto(), PROBE_TOKENS))
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        assert not streams.any_ended(), "the streams ended before the swap: the test proves nothing"
    assert streams.results() == undisturbed
    streams.close()
    assert masked != undisturbed[0][:PROBE_TOKENS]


def test_a_gate_set_survives_a_restart(arguments: list[str], prompts: list[tuple[int, ...]], tmp_path: Path) -> None:
    store, job = tmp_path / "store", Job(prompts[2], pb.Auto(), PROBE_TOKENS)
    with running_server(*arguments, store=store) as first:
        answer = tokens_of(generate(first.grpc, job))
    second = start_server(store=store)  # nothing is named: all comes from the store
    try:
        second.wait_until_ready()
        assert tokens_of(generate(second.grpc, job)) == answer
    finally:
        stop_server(second)


def test_an_adapter_joins_with_training_free_gates(
    own_server: RunningServer, adapter_folders: dict[str, Path], prompts: list[tuple[int, ...]]
) -> None:
    with grpc.insecure_channel(own_server.grpc) as channel:
        load = admin.LoadAdapterRequest(name="new", source=str(adapter_folders[OTHER]))
        admin_stubs.AdapterAdminStub(channel).LoadAdapter(load, timeout=60)
    joined = generate(own_server.grpc, Job(prompts[3], pb.Auto(join=True), PROBE_TOKENS))
    assert joined.auto.joined == ["new"]
    forced = Job(prompts[3], pb.Auto(join=True, allow=["new"], null=False), PROBE_TOKENS)
    assert tokens_of(generate(own_server.grpc, forced)) == tokens_of(
        generate(own_server.grpc, replace(forced, adapter="new"))
    )

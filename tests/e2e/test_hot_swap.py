"""Proof 3: adapters are replaced and unloaded while 16 streams run, and nobody notices."""

import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import grpc
import pytest

from perseid_protos.perseid.v1 import adapter_admin_pb2 as admin
from perseid_protos.perseid.v1 import adapter_admin_pb2_grpc as admin_stubs
from tests.e2e.client import Job, Streams, generate, generate_all, tokens_of
from tests.e2e.reference import RECIPES
from tests.e2e.running import RunningServer, running_server

STREAM_TOKENS = 200  # enough to still run when the swap is over
PROBE_TOKENS = 12
FIRST, SECOND, THIRD = (recipe.name for recipe in RECIPES[2:5])


@pytest.fixture
def own_server(adapter_folders: dict[str, Path], tmp_path: Path):
    """A server of this test's own: names change meaning here."""
    root = adapter_folders[FIRST].parent
    with running_server(
        f"--adapter=swapped={adapter_folders[FIRST]}",
        f"--adapter=steady={adapter_folders[SECOND]}",
        "--adapter-root",
        str(root),
        store=tmp_path / "store",
    ) as running:
        yield running


def wait_for(condition, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def test_streams_end_on_the_version_they_began_with(
    own_server: RunningServer, adapter_folders: dict[str, Path], prompts: list[tuple[int, ...]]
) -> None:
    names = ["swapped", "steady", None, "swapped"] * 4
    jobs = [Job(prompts[i], names[i], STREAM_TOKENS) for i in range(16)]
    undisturbed = [tokens_of(response) for response in generate_all(own_server.grpc, jobs)]

    streams = Streams(own_server.grpc, jobs)
    with grpc.insecure_channel(own_server.grpc) as channel:
        stub = admin_stubs.AdapterAdminStub(channel)
        wait_for(streams.all_started)
        third = str(adapter_folders[THIRD])
        stub.LoadAdapter(admin.LoadAdapterRequest(name="swapped", source=third, replace=True), timeout=60)
        replaced = tokens_of(generate(own_server.grpc, replace(jobs[0], num_tokens=PROBE_TOKENS)))
        stub.UnloadAdapter(admin.UnloadAdapterRequest(name="steady"), timeout=60)
        with pytest.raises(grpc.RpcError) as refused:
            generate(own_server.grpc, jobs[1])
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        assert not streams.any_ended(), "the streams ended before the swap: the test proves nothing"
        assert streams.results() == undisturbed
        streams.close()

        stub.LoadAdapter(admin.LoadAdapterRequest(name="third", source=third), timeout=60)
        assert replaced == tokens_of(generate(own_server.grpc, Job(prompts[0], "third", PROBE_TOKENS)))
        assert replaced != undisturbed[0][:PROBE_TOKENS]


def test_a_load_does_not_stall_the_streams(
    own_server: RunningServer, adapter_folders: dict[str, Path], prompts: list[tuple[int, ...]]
) -> None:
    """While adapters come and go, tokens keep coming: more of them than loads, between any two of which some arrive."""
    streams = Streams(own_server.grpc, [Job(prompts[i], None, STREAM_TOKENS) for i in range(4)])
    wait_for(streams.all_started)
    counts = [streams.num_tokens()]
    with grpc.insecure_channel(own_server.grpc) as channel:
        stub = admin_stubs.AdapterAdminStub(channel)
        for folder in list(adapter_folders.values())[:4]:
            stub.LoadAdapter(admin.LoadAdapterRequest(name="passing", source=str(folder), replace=True), timeout=60)
            generate(own_server.grpc, Job(prompts[5], "passing", 2))
            counts.append(streams.num_tokens())
    assert not streams.any_ended(), "the streams ended before the loads: the test proves nothing"
    assert all(after > before for before, after in pairwise(counts)), counts
    assert all(len(tokens) == STREAM_TOKENS for tokens in streams.results())
    streams.close()

"""Proof 3: adapters are replaced and unloaded while 16 streams run, and nobody notices."""

import time
from pathlib import Path

import grpc
import pytest
from tests.e2e.client import Job, Streams, generate, tokens_of
from tests.e2e.reference import RECIPES
from tests.e2e.running import RunningServer, running_server

from perseid_protos.perseid.v1 import adapter_admin_pb2 as admin
from perseid_protos.perseid.v1 import adapter_admin_pb2_grpc as admin_stubs

NUM_TOKENS = 120
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
    jobs = [Job(prompts[i], names[i], NUM_TOKENS) for i in range(16)]
    alone = [tokens_of(generate(own_server.grpc, job)) for job in jobs]

    streams = Streams(own_server.grpc, jobs)
    with grpc.insecure_channel(own_server.grpc) as channel:
        stub = admin_stubs.AdapterAdminStub(channel)
        wait_for(streams.all_started)
        stub.LoadAdapter(
            admin.LoadAdapterRequest(name="swapped", source=str(adapter_folders[THIRD]), replace=True), timeout=60
        )
        replaced = tokens_of(generate(own_server.grpc, jobs[0]))
        assert not streams.any_ended(), "the streams ended before the swap: the test proves nothing"
        stub.UnloadAdapter(admin.UnloadAdapterRequest(name="steady"), timeout=60)
        with pytest.raises(grpc.RpcError) as refused:
            generate(own_server.grpc, jobs[1])
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        assert streams.results() == alone
        streams.close()

        third = Job(prompts[0], "third", NUM_TOKENS)
        stub.LoadAdapter(admin.LoadAdapterRequest(name="third", source=str(adapter_folders[THIRD])), timeout=60)
        assert replaced == tokens_of(generate(own_server.grpc, third))
        assert replaced != alone[0]

"""Proof 3: adapters are replaced and unloaded while 16 streams run, and nobody notices."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import torch
from safetensors.torch import save_file

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


def write_large_adapter(folder: Path) -> Path:
    """Rank 256 on every linear: sixteen pages, hundreds of megabytes on their way to the device."""
    attention = {"q": (576, 576), "k": (576, 192), "v": (576, 192), "o": (576, 576)}
    mlp = {"gate": (576, 1536), "up": (576, 1536), "down": (1536, 576)}
    tensors = {}
    for layer in range(30):
        for parent, projections in (("self_attn", attention), ("mlp", mlp)):
            for name, (inputs, outputs) in projections.items():
                prefix = f"base_model.model.model.layers.{layer}.{parent}.{name}_proj"
                tensors[f"{prefix}.lora_A.weight"] = torch.full((256, inputs), 1e-3, dtype=torch.float16)
                tensors[f"{prefix}.lora_B.weight"] = torch.full((outputs, 256), 1e-3, dtype=torch.float16)
    targets = [f"{name}_proj" for name in (*attention, *mlp)]
    config = {"peft_type": "LORA", "r": 256, "lora_alpha": 1, "target_modules": targets}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_load_does_not_stall_the_streams(
    own_server: RunningServer, adapter_folders: dict[str, Path], prompts: list[tuple[int, ...]]
) -> None:
    """While an adapter travels to the device for its first request, every stream takes many steps. If it travelled
    inside a step, a stream would get one token of the step before and one of the step after."""
    large = write_large_adapter(adapter_folders[FIRST].parent / "large")
    with grpc.insecure_channel(own_server.grpc) as channel:
        stub = admin_stubs.AdapterAdminStub(channel)
        stub.LoadAdapter(admin.LoadAdapterRequest(name="large", source=str(large)), timeout=120)
    streams = Streams(own_server.grpc, [Job(prompts[i], None, 600, drafts=False) for i in range(4)])
    wait_for(streams.all_started)
    before = streams.num_tokens_each()
    generate(own_server.grpc, Job(prompts[5], "large", 1))
    steps = [after - first for first, after in zip(before, streams.num_tokens_each(), strict=True)]
    assert not streams.any_ended(), "the streams ended before the load: the test proves nothing"
    assert min(steps) > 4, steps
    assert all(len(tokens) == 600 for tokens in streams.results())
    streams.close()
    shutil.rmtree(large)

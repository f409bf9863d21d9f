"""500 registered adapters with room for 8 on the device: every one is served, and served rightly."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

from perseid_protos.perseid.v1 import adapter_admin_pb2 as admin
from perseid_protos.perseid.v1 import adapter_admin_pb2_grpc as admin_stubs
from tests.e2e.client import Job, generate_all, tokens_of
from tests.e2e.running import RunningServer, running_server

NUM_ADAPTERS = 500
ROOM = 8
NUM_TOKENS = 8
PAGE_MIB = 20  # one page of this base takes 19.7 MB


def write_small_adapter(folder: Path, seed: int) -> Path:
    """Rank 1 on one projection of one layer, strong enough to change the answer."""
    layer = seed % 30
    rng = torch.Generator().manual_seed(seed)
    prefix = f"base_model.model.model.layers.{layer}.mlp.down_proj"
    tensors = {
        f"{prefix}.lora_A.weight": torch.randn(1, 1536, generator=rng) / 3,
        f"{prefix}.lora_B.weight": torch.randn(576, 1, generator=rng) * 2,
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "r": 1,
        "lora_alpha": 1,
        "target_modules": ["down_proj"],
        "layers_to_transform": [layer],
    }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def small_adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """500 adapter folders."""
    root = tmp_path_factory.mktemp("small")
    return [write_small_adapter(root / f"small-{seed:03}", seed) for seed in range(NUM_ADAPTERS)]


@pytest.fixture(scope="module")
def crowded(small_adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that has loaded them all."""
    store = tmp_path_factory.mktemp("crowded") / "store"
    root = small_adapters[0].parent
    options = ("--adapter-root", str(root), "--adapter-memory", str(ROOM * PAGE_MIB))
    with running_server(*options, store=store) as server:
        with grpc.insecure_channel(server.grpc) as channel:
            stub = admin_stubs.AdapterAdminStub(channel)
            for folder in small_adapters:
                stub.LoadAdapter(admin.LoadAdapterRequest(name=folder.name, source=str(folder)), timeout=60)
        yield server


def reference_tokens(model, folder: Path, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """PEFT's greedy answer with this adapter."""
    peft = PeftModel.from_pretrained(model, folder)
    try:
        ids = torch.tensor([prompt])
        out = peft.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None, pad_token_id=0,
            max_new_tokens=NUM_TOKENS,
        )  # fmt: skip
        return tuple(out[0, len(prompt) :].tolist())
    finally:
        peft.unload()


def test_every_adapter_answers_with_room_for_eight(
    crowded: RunningServer, small_adapters: list[Path], reference_model, prompts: list[tuple[int, ...]]
) -> None:
    with grpc.insecure_channel(crowded.grpc) as channel:
        listed = admin_stubs.AdapterAdminStub(channel).ListAdapters(admin.ListAdaptersRequest(), timeout=60)
    assert len(listed.adapters) == NUM_ADAPTERS
    assert f'num_pages="{ROOM}"' in crowded.metrics()

    chosen = random.Random(5).sample(small_adapters, 48)
    jobs = [Job(prompts[1], folder.name, NUM_TOKENS) for folder in chosen]
    answers = [tokens_of(response) for response in generate_all(crowded.grpc, jobs)]
    assert len(set(answers)) > 40, "the adapters change the answer"
    for folder, answer in list(zip(chosen, answers, strict=True))[::8]:
        assert answer == reference_tokens(reference_model, folder, prompts[1]), folder.name

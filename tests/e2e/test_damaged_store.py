"""A stored adapter that is damaged while the server runs: found when the engine loads it, told to who asked for it, and
nobody else notices.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.chaos.admin import OK, TRANSPORTS, Admin, Told
from tests.e2e.client import Job, generate, tokens_of
from tests.e2e.running import RunningServer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OTHER = "r4-qv"
Damage = Callable[[Path], None]


@pytest.fixture
def fragile(adapter_folders: dict[str, Path], server: RunningServer) -> Iterator[Path]:
    """A small adapter's folder, where clients may load from; its name is free again afterwards."""
    folder = adapter_folders[OTHER].parent / "fragile"
    folder.mkdir()
    module = "base_model.model.model.layers.3.self_attn.v_proj"
    random = np.random.default_rng(5)
    shapes = {"lora_A": (1, 576), "lora_B": (192, 1)}
    tensors = {f"{module}.{part}.weight": random.standard_normal(shape) for part, shape in shapes.items()}
    save_file({name: tensor.astype(np.float16) for name, tensor in tensors.items()}, folder / WEIGHTS)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["v_proj"], "layers_to_transform": [3]}
    (folder / CONFIG).write_text(json.dumps(config))
    yield folder
    shutil.rmtree(folder)
    Admin(server.http, server.grpc).unload("http", "fragile")
    for damaged in server.store.rglob("*.damaged"):
        shutil.rmtree(damaged)


def flip(file: str, place: int) -> Damage:
    def damage(version: Path) -> None:
        content = bytearray((version / file).read_bytes())
        content[place] ^= 1
        (version / file).write_bytes(content)

    return damage


def cut(file: str, length: int) -> Damage:
    def damage(version: Path) -> None:
        (version / file).write_bytes((version / file).read_bytes()[:length])

    return damage


FEW: list[Damage] = [
    flip(CONFIG, 0),
    flip(CONFIG, -1),
    flip(WEIGHTS, 7),
    flip(WEIGHTS, 100),
    flip(WEIGHTS, -1),
    cut(CONFIG, 0),
    cut(WEIGHTS, 0),
    cut(WEIGHTS, -1),
    lambda version: (version / WEIGHTS).unlink(),
    shutil.rmtree,
]


def test_damage_found_when_the_engine_loads_it(
    server: RunningServer, fragile: Path, prompts: list[tuple[int, ...]]
) -> None:
    _survives(server, fragile, FEW, prompts[0])


@pytest.mark.chaos
def test_every_byte(server: RunningServer, fragile: Path, prompts: list[tuple[int, ...]]) -> None:
    damages = [
        make(file, place)
        for file in (CONFIG, WEIGHTS)
        for place in range((fragile / file).stat().st_size)
        for make in (flip, cut)
    ]
    _survives(server, fragile, damages, prompts[0])


def _survives(server: RunningServer, fragile: Path, damages: list[Damage], prompt: tuple[int, ...]) -> None:
    asked, other = Admin(server.http, server.grpc), Job(prompt, OTHER, 4)
    undisturbed = tokens_of(generate(server.grpc, other))
    before = set((server.store / "versions").iterdir())
    for number, damage in enumerate(damages):
        assert asked.load(TRANSPORTS[number % 2], "fragile", fragile) == Told(OK), "a load mends it"
        [version] = {path for path in (server.store / "versions").iterdir() if path.suffix != ".damaged"} - before
        damage(version)
        message = _refusal(server, TRANSPORTS[number % 2], prompt)
        assert message.startswith("the adapter cannot be loaded: its files "), message
        assert "have changed since it was loaded; load it again" in message or "cannot be read" in message, message
        if number % 50 == 0:
            assert tokens_of(generate(server.grpc, other)) == undisturbed
    assert asked.load("http", "fragile", fragile) == Told(OK)
    assert len(tokens_of(generate(server.grpc, Job(prompt, "fragile", 4)))) == 4
    assert tokens_of(generate(server.grpc, other)) == undisturbed
    assert server.metric("perseid_engine_restarts_total") == 0


def _refusal(server: RunningServer, transport: str, prompt: tuple[int, ...]) -> str:
    if transport == "http":
        body = {"model": "fragile", "prompt": list(prompt), "max_tokens": 4}
        answer = httpx.post(f"{server.http}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 500, answer.text
        return str(answer.json()["error"]["message"])
    with pytest.raises(grpc.RpcError) as refused:
        generate(server.grpc, Job(prompt, "fragile", 4))
    assert refused.value.code() is grpc.StatusCode.INTERNAL
    return str(refused.value.details())

"""A MeteoRA checkpoint is loaded under one name: its adapters and its gate set, all of them or none."""

from pathlib import Path

import pytest

from perseid_server.engine.adaptation import Routing
from perseid_server.errors import AdapterRejected, Conflict, InvalidRequest, PerseidError
from perseid_server.frontend.adaptation_options import AutoOptions
from tests.server.meteora_folder import write_meteora
from tests.server.stack import Stack, known, make_stack, stored


def nothing_half_done(stack: Stack) -> bool:
    return list((stack.root.parent / "store" / "tmp").iterdir()) == []


async def test_it_brings_its_adapters_and_its_gates(stack: Stack) -> None:
    loaded = await stack.registry.load("m", str(write_meteora(stack.root / "checkpoint")), pin=True)
    assert [(each.name, each.info.kind) for each in stack.registry.list()] == [
        ("m.sql", "LoRA"), ("m.sums", "LoRA"), ("m", "gates")
    ]  # fmt: skip
    assert [adapter.info.rank for adapter in stack.registry.adapters()] == [2, 3]
    assert loaded == stack.registry.get("m")
    assert all(
        each.entry.pinned and each.entry.source == str(stack.root / "checkpoint") for each in stack.registry.list()
    )
    versions = tuple(adapter.version for adapter in stack.registry.adapters())
    assert (stack.engine.gate_sets[loaded.version].adapters, loaded.config.method) == (versions, "meteora")
    assert stored(stack) == known(stack) == {loaded.version, *versions}
    assert nothing_half_done(stack)


@pytest.mark.parametrize("name", ["m.sums", "sums"])
async def test_auto_may_name_its_adapters_either_way(stack: Stack, name: str) -> None:
    gates = await stack.registry.load("m", str(write_meteora(stack.root / "checkpoint")))
    with stack.service._resolver.leased(AutoOptions(allow=(name,))) as decide:
        version = stack.registry.get("m.sums").version
        assert decide((1,)).adaptation.routing == Routing(gates.version, (None, version), 2, 1.0)


async def test_a_restart_serves_all_of_it(stack: Stack, tmp_path: Path) -> None:
    await stack.registry.load("m", str(write_meteora(stack.root / "checkpoint")))
    before = [(each.name, each.version) for each in stack.registry.list()]
    stack.store.close()
    again = make_stack(tmp_path)
    await again.registry.restore()
    assert [(each.name, each.version) for each in again.registry.list()] == before


@pytest.mark.parametrize("taken", ["m", "m.sums"])
async def test_one_taken_name_refuses_all(stack: Stack, taken: str) -> None:
    version = await stack.load(taken)
    folder = str(write_meteora(stack.root / "checkpoint"))
    with pytest.raises(Conflict, match=f"an adapter '{taken}' is loaded already"):
        await stack.registry.load("m", folder)
    assert [each.name for each in stack.registry.list()] == [taken]
    assert stored(stack) == known(stack) == {version}
    assert nothing_half_done(stack)
    await stack.registry.load("m", folder, replace=True)
    assert {each.name for each in stack.registry.list()} == {"m", "m.sql", "m.sums"}
    assert version not in stored(stack)


@pytest.mark.parametrize(
    ("changes", "name", "error", "words"),
    [
        ({"spoil": "lora_B"}, "m", AdapterRejected, "NaN"),
        ({"spoil": "moe_gate"}, "m", AdapterRejected, "NaN"),
        ({"config": False}, "m", AdapterRejected, "meteora.json"),
        ({}, "x" * 126, InvalidRequest, "expected 1 to 128 letters"),
    ],
    ids=["an adapter", "the gates", "no config", "a name too long for its adapters"],
)
async def test_what_is_refused_leaves_no_trace(
    stack: Stack, changes: dict, name: str, error: type[PerseidError], words: str
) -> None:
    folder = str(write_meteora(stack.root / "checkpoint", **changes))
    with pytest.raises(error) as refused:
        await stack.registry.load(name, folder)
    assert words in refused.value.message
    assert (stored(stack), known(stack), stack.registry.list()) == (set(), set(), ())
    assert nothing_half_done(stack)


async def test_a_link_among_its_files_is_refused_below_an_adapter_root(stack: Stack) -> None:
    folder = write_meteora(stack.root / "checkpoint")
    elsewhere = (folder / "model.safetensors").rename(stack.root.parent / "elsewhere")
    (folder / "model.safetensors").symlink_to(elsewhere)
    with pytest.raises(PerseidError) as refused:
        await stack.registry.load("m", str(folder))
    assert refused.value.field == "source"
    assert stack.registry.list() == ()

"""Gate sets among the adapters: the same names, the same store, the same leases."""

from pathlib import Path

import pytest

from perseid_server.adapters.store import version_of
from perseid_server.engine.adaptation import BASE_COLUMN, Adaptation, Routing
from perseid_server.errors import AdapterRejected, Conflict
from perseid_server.frontend.adaptation_options import AutoOptions
from perseid_server.frontend.requests import GenerationRequest, SamplingOptions, TextInput
from tests.fakes import expected, tiny_spec
from tests.server.stack import Stack, background, certain_router, known, make_stack, stored, write_gate_set


async def test_a_gate_set_is_loaded_listed_and_told_with_its_columns(stack: Stack) -> None:
    versions = [await stack.load(name, seed=seed) for seed, name in enumerate("ab")]
    version = await stack.load_gates("g", "b", "a", k=1)
    assert [loaded.name for loaded in stack.registry.list()] == ["a", "b", "g"]
    assert [loaded.name for loaded in stack.registry.gate_sets()] == ["g"]
    assert stack.registry.get("g").config.k == 1
    told = stack.engine.gate_sets[version]
    assert (told.adapters, told.null, told.pinned) == ((versions[1], versions[0]), True, False)
    assert told.path == str(stack.store.folder(version))
    assert version_of(stack.store.folder(version)) == version


async def test_names_are_shared_by_adapters_and_gate_sets(stack: Stack) -> None:
    await stack.load("a")
    await stack.load_gates("g", "a")
    with pytest.raises(Conflict, match="a gate set 'g' is loaded already"):
        await stack.load("g")
    with pytest.raises(Conflict, match="an adapter 'a' is loaded already"):
        await stack.load_gates("a", "a")
    version = await stack.load("g", replace=True)
    assert stack.registry.gate_sets() == ()
    assert stack.engine.gate_sets == {}
    assert version in known(stack)


async def test_an_unloaded_gate_set_stays_until_its_last_request_has_ended(stack: Stack) -> None:
    adapter = await stack.load("a")
    version = await stack.load_gates("g", "a")
    with stack.registry.leases.hold(version):
        await stack.registry.unload("g")
        assert stored(stack) == {adapter, version}
        assert set(stack.engine.gate_sets) == {version}
    await background(stack)
    assert (stored(stack), stack.engine.gate_sets) == ({adapter}, {})


async def test_a_gate_set_outlives_its_adapters(stack: Stack) -> None:
    await stack.load("a")
    version = await stack.load_gates("g", "a")
    await stack.registry.unload("a")
    assert stored(stack) == known(stack) == {version}


async def test_a_gate_set_is_pinned_and_unpinned(stack: Stack) -> None:
    await stack.load("a")
    version = await stack.load_gates("g", "a")
    for pinned in (True, False):
        loaded = await stack.registry.pin("g", pinned=pinned)
        assert loaded.entry.pinned is stack.engine.gate_sets[version].pinned is pinned
        assert loaded.router is stack.registry.get("g").router


async def test_a_restart_serves_both_kinds(stack: Stack, tmp_path: Path) -> None:
    adapter = await stack.load("a")
    version = await stack.load_gates("g", "a", router=certain_router("a"))
    await stack.registry.pin("g", pinned=True)
    stack.store.close()
    again = make_stack(tmp_path)
    await again.registry.restore()
    assert {loaded.name: loaded.version for loaded in again.registry.list()} == {"a": adapter, "g": version}
    assert again.engine.gate_sets[version].pinned
    assert again.registry.get("g").router.decide(tuple(b"aaaa"), [0]) == 0


async def test_a_gate_set_for_another_base_is_refused_and_leaves_no_trace(stack: Stack) -> None:
    await stack.load("a")
    folder = write_gate_set(stack.root / "g", {"a": "0" * 64}, base=tiny_spec(num_layers=3))
    before = stored(stack)
    with pytest.raises(AdapterRejected, match="layer 2; the base has layers 0 to 1"):
        await stack.registry.load("g", str(folder))
    assert (stored(stack), stack.engine.gate_sets) == (before, {})
    assert list((stack.root.parent / "store" / "tmp").iterdir()) == []


async def test_a_running_auto_request_ends_on_what_it_began_with(stack: Stack) -> None:
    versions = {name: await stack.load(name, seed=seed) for seed, name in enumerate("ab")}
    gates = await stack.load_gates("g", "a", "b")
    asked = GenerationRequest("r", TextInput("say"), AutoOptions(), SamplingOptions(max_tokens=8))
    async with stack.service.generate(asked) as generation:
        columns = (versions["a"], versions["b"], BASE_COLUMN)
        deltas = [await anext(aiter(generation))]
        await stack.load("a", seed=5, replace=True)
        await stack.registry.unload("b")
        await stack.load_gates("g", "a", seed=5, replace=True)
        assert {gates, *versions.values()} <= known(stack)
        deltas += [delta async for delta in generation]
    adaptation = Adaptation(routing=Routing(gates, columns, 2, 1.0))
    told = tuple(token for delta in deltas for token in delta.token_ids)
    assert told == expected(tuple(b"say"), adaptation.key, 8)
    await background(stack)
    assert known(stack) == stored(stack) == {loaded.version for loaded in stack.registry.list()}

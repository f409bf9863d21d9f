"""Medusa heads among the adapters: the same names and the same store, and leases of nobody."""

from pathlib import Path

import pytest

from perseid_server.adapters.store import version_of
from perseid_server.errors import AdapterRejected, Conflict, InvalidRequest, NotFound
from perseid_server.frontend.adaptation_options import AutoOptions, BlendOf, Named
from perseid_server.frontend.requests import GenerationRequest, SamplingOptions, TextInput
from perseid_server.speculation.heads_config import HeadsConfig
from tests.fakes import expected, tiny_spec
from tests.server.speculation.heads_folders import medusa_v2, vllm, write_heads
from tests.server.stack import Stack, make_stack, stored


async def load_heads(stack: Stack, name: str, *, seed: int = 0, **options) -> str:
    """Write heads and load them; returns their version."""
    folder = write_heads(stack.root / f"{name}-heads-{seed}", seed=seed)
    return (await stack.registry.load(name, str(folder), **options)).version


async def test_heads_are_loaded_listed_and_told(stack: Stack) -> None:
    await stack.load("a")
    version = await load_heads(stack, "h")
    assert [loaded.name for loaded in stack.registry.list()] == ["a", "h"]
    assert [loaded.name for loaded in stack.registry.heads()] == ["h"]
    assert stack.registry.get("h").info.num_heads == 3
    assert stack.engine.heads[version].path == str(stack.store.folder(version))
    assert version_of(stack.store.folder(version)) == version


async def test_heads_in_vllms_layout_and_their_configs_are_stored(stack: Stack) -> None:
    folder = write_heads(stack.root / "v", vllm(2), file="model.safetensors", config=HeadsConfig("a" * 64))
    (folder / "config.json").write_text('{"architectures": ["MedusaModel"], "num_heads": 2}')
    loaded = await stack.registry.load("h", str(folder))
    assert (loaded.info.layout, loaded.info.adapter) == ("vLLM", "a" * 64)
    kept = {path.name for path in stack.store.folder(loaded.version).iterdir()}
    assert kept == {"medusa_lm_head.safetensors", "perseid_heads.json", "config.json"}


async def test_names_are_shared_with_adapters(stack: Stack) -> None:
    await stack.load("a")
    await load_heads(stack, "h")
    with pytest.raises(Conflict, match="a set of Medusa heads 'h' is loaded already"):
        await stack.load("h")
    with pytest.raises(Conflict, match="an adapter 'a' is loaded already"):
        await load_heads(stack, "a")
    await stack.load("h", replace=True)
    assert stack.registry.heads() == ()
    assert stack.engine.heads == {}


async def test_unloading_heads_ends_them_at_once(stack: Stack) -> None:
    version = await load_heads(stack, "h")
    assert stored(stack) == {version}
    await stack.registry.unload("h")
    assert (stored(stack), stack.engine.heads) == (set(), {})


async def test_a_running_request_does_not_mind(stack: Stack) -> None:
    await load_heads(stack, "h")
    asked = GenerationRequest("r", TextInput("say"), None, SamplingOptions(max_tokens=8))
    async with stack.service.generate(asked) as generation:
        deltas = [await anext(aiter(generation))]
        await load_heads(stack, "h", seed=1, replace=True)
        await stack.registry.unload("h")
        deltas += [delta async for delta in generation]
    told = tuple(token for delta in deltas for token in delta.token_ids)
    assert told == expected(tuple(b"say"), None, 8)
    assert (stored(stack), stack.engine.heads) == (set(), {})


async def test_a_version_stays_while_it_has_a_name(stack: Stack) -> None:
    await stack.load("a")
    version = await load_heads(stack, "h")
    assert await load_heads(stack, "again", adapter="a") == version
    await stack.registry.unload("h")
    assert set(stack.engine.heads) == {version}
    [left] = stack.registry.heads()
    assert (left.name, left.entry.adapter) == ("again", "a")
    await stack.registry.unload("again")
    assert stack.engine.heads == {}


async def test_a_restart_serves_heads_for_whom_they_were_loaded(stack: Stack, tmp_path: Path) -> None:
    await stack.load("a")
    versions = {name: await load_heads(stack, name, seed=seed) for seed, name in enumerate("hi")}
    await load_heads(stack, "h", adapter="a", replace=True)
    stack.store.close()
    again = make_stack(tmp_path)
    await again.registry.restore()
    told = {heads.name: (heads.version, heads.entry.adapter) for heads in again.registry.heads()}
    assert told == {"h": (versions["h"], "a"), "i": (versions["i"], None)}
    assert set(again.engine.heads) == set(versions.values())


async def test_heads_for_another_base_are_refused_and_leave_no_trace(stack: Stack) -> None:
    folder = write_heads(stack.root / "h", medusa_v2(base=tiny_spec(hidden_size=16)))
    with pytest.raises(AdapterRejected, match=r"shape \[16, 16\], this base needs \[8, 8\]"):
        await stack.registry.load("h", str(folder))
    assert (stored(stack), stack.engine.heads) == (set(), {})
    assert list((stack.root.parent / "store" / "tmp").iterdir()) == []


async def test_whom_heads_are_for_must_be_an_adapter(stack: Stack) -> None:
    await stack.load("a")
    await load_heads(stack, "h")
    for name, kind, words in (
        ("nobody", NotFound, "adapter: no adapter 'nobody' is loaded"),
        ("h", InvalidRequest, "adapter: 'h' is a set of Medusa heads, where an adapter is expected"),
    ):
        with pytest.raises(kind, match=words) as caught:
            await load_heads(stack, "new", seed=1, adapter=name)
        assert caught.value.field == "adapter"
    with pytest.raises(InvalidRequest, match="adapter: only Medusa heads are for an adapter"):
        await stack.registry.load("b", str(stack.root / "a-0"), adapter="a")
    assert [loaded.name for loaded in stack.registry.list()] == ["a", "h"]
    assert list((stack.root.parent / "store" / "tmp").iterdir()) == []


async def test_pinning_heads_is_remembered_and_changes_nothing(stack: Stack) -> None:
    version = await load_heads(stack, "h")
    before = stack.engine.heads[version]
    assert (await stack.registry.pin("h", pinned=True)).entry.pinned
    assert stack.engine.heads[version] is before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (Named("h"), "'h' is a set of Medusa heads, where an adapter is expected"),
        (BlendOf((("a", 0.5), ("h", 0.5))), r"adapters\.1\.name: 'h' is a set of Medusa heads"),
        (AutoOptions(gate_set="h"), r"auto\.gate_set: 'h' is a set of Medusa heads, not a gate set"),
        (AutoOptions(allow=("h",)), r"auto\.allow\.0: 'h' is neither a loaded adapter nor one of gate set 'g'"),
    ],
)
async def test_heads_cannot_be_asked_for_as_what_adapts_the_base(stack: Stack, options, words) -> None:
    await stack.load("a")
    await stack.load_gates("g", "a")
    await load_heads(stack, "h")
    asked = GenerationRequest("r", TextInput("say"), options, SamplingOptions(max_tokens=1))
    with pytest.raises(InvalidRequest, match=words):
        async with stack.service.generate(asked):
            pass

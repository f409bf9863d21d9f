"""Names, versions and leases: a request ends on the version it began with, and nothing outlives its users."""

import asyncio
import gc
import threading
from pathlib import Path

import pytest

from perseid_server.adapters.source import SourcePolicy
from perseid_server.errors import AdapterRejected, Conflict, Forbidden, InvalidRequest, NotFound, Unavailable
from perseid_server.frontend.registry import AdapterRegistry
from tests.fakes import tiny_spec
from tests.server.stack import Stack, background, known, make_stack, settle, stored, write_adapter


async def test_a_loaded_adapter_is_listed_known_to_the_engine_and_stored(stack: Stack) -> None:
    version = await stack.load("one")
    assert [adapter.name for adapter in stack.registry.list()] == ["one"]
    assert stack.registry.get("one").info.rank == 2
    assert stored(stack) == known(stack) == {version}
    assert stack.registry.names() == {version: "one"}


async def test_an_unloaded_adapter_is_gone_everywhere(stack: Stack) -> None:
    await stack.load("one")
    await stack.registry.unload("one")
    assert (stack.registry.list(), stored(stack), known(stack)) == ((), set(), set())
    with pytest.raises(NotFound, match="no adapter 'one' is loaded"):
        stack.registry.get("one")


async def test_a_leased_version_stays_until_the_lease_ends(stack: Stack) -> None:
    version = await stack.load("one")
    with stack.registry.lease("one") as leased:
        await stack.registry.unload("one")
        assert leased.version == version
        assert stored(stack) == known(stack) == {version}
        with pytest.raises(NotFound), stack.registry.lease("one"):
            pass
    await background(stack)
    assert (stored(stack), known(stack)) == (set(), set())


async def test_replacing_gives_new_requests_the_new_version_and_old_ones_the_old(stack: Stack) -> None:
    first = await stack.load("one", seed=1)
    with stack.registry.lease("one") as before:
        second = await stack.load("one", seed=2, replace=True)
        with stack.registry.lease("one") as after:
            assert (before.version, after.version) == (first, second)
            assert first != second
        assert stored(stack) == {first, second}
    await background(stack)
    assert stored(stack) == known(stack) == {second}


async def test_the_last_of_several_leases_lets_go(stack: Stack) -> None:
    version = await stack.load("one")
    with stack.registry.lease("one"):
        with stack.registry.lease("one"):
            await stack.registry.unload("one")
        await background(stack)
        assert stored(stack) == {version}
    await background(stack)
    assert stored(stack) == set()


async def test_a_version_with_two_names_outlives_one_of_them(stack: Stack) -> None:
    folder = str(write_adapter(stack.root / "same"))
    version = (await stack.registry.load("one", folder)).version
    assert (await stack.registry.load("two", folder)).version == version
    await stack.registry.unload("one")
    assert stored(stack) == known(stack) == {version}


async def test_a_version_unloaded_and_loaded_again_while_leased_is_kept(stack: Stack) -> None:
    version = await stack.load("one")
    with stack.registry.lease("one"):
        await stack.registry.unload("one")
        await stack.load("one")
    await background(stack)
    assert stored(stack) == known(stack) == {version}


async def test_replacing_by_the_same_content_changes_nothing(stack: Stack) -> None:
    version = await stack.load("one")
    assert await stack.load("one", replace=True) == version
    assert stored(stack) == known(stack) == {version}


async def test_a_taken_name_is_a_conflict_unless_replaced(stack: Stack) -> None:
    version = await stack.load("one", seed=1)
    with pytest.raises(Conflict, match="loaded already"):
        await stack.load("one", seed=2)
    assert stack.registry.get("one").version == version
    assert stored(stack) == {version}


async def test_of_two_loads_of_a_name_at_once_one_wins(stack: Stack) -> None:
    results = await asyncio.gather(stack.load("one", seed=1), stack.load("one", seed=2), return_exceptions=True)
    winners = [result for result in results if isinstance(result, str)]
    assert len(winners) == 1
    assert [type(result) for result in results if not isinstance(result, str)] == [Conflict]
    assert stored(stack) == {stack.registry.get("one").version} == set(winners)


@pytest.mark.parametrize("name", ["", "a" * 129, "../x", "/x", "a/b/c", "a:b", ".x", "é", "a b", "a\n", "tiny", "auto"])
async def test_names_that_are_not_allowed_are_refused(stack: Stack, name: str) -> None:
    folder = str(write_adapter(stack.root / "one"))
    with pytest.raises(InvalidRequest, match="name"):
        await stack.registry.load(name, folder)
    assert stored(stack) == set()


@pytest.mark.parametrize("source", ["/etc", "../../etc", "", "org/name", "missing", "a\0b"])
async def test_clients_may_load_only_from_the_roots(stack: Stack, source: str) -> None:
    with pytest.raises((Forbidden, InvalidRequest)) as refused:
        await stack.registry.load("one", source)
    assert refused.value.field == "source"
    assert stack.registry.list() == ()


async def test_what_is_refused_leaves_no_trace(stack: Stack) -> None:
    folder = write_adapter(stack.root / "one")
    (folder / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(AdapterRejected):
        await stack.registry.load("one", str(folder))
    assert (stored(stack), known(stack), stack.registry.list()) == (set(), set(), ())
    assert list((stack.root.parent / "store" / "tmp").iterdir()) == []


async def test_a_failing_disk_is_unavailable_and_changes_nothing(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    version = await stack.load("one", seed=1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stack.store, "commit", full)
    with pytest.raises(Unavailable, match="No space left on device"):
        await stack.load("one", seed=2, replace=True)
    assert stack.registry.get("one").version == version
    assert known(stack) == {version}


@pytest.mark.parametrize(("change", "step"), [("load", "commit"), ("unload", "remove"), ("pin", "pin")])
async def test_a_change_whose_caller_leaves_meanwhile_is_made_whole(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, change: str, step: str
) -> None:
    await stack.load("one", seed=1)
    on_disk = getattr(stack.store, step)
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def slow(*args: object, **kwargs: object) -> object:
        begun.set()
        assert may_end.wait(10)
        try:
            return on_disk(*args, **kwargs)
        finally:
            ended.set()

    monkeypatch.setattr(stack.store, step, slow)
    changes = {
        "load": lambda: stack.load("one", seed=2, replace=True),
        "unload": lambda: stack.registry.unload("one"),
        "pin": lambda: stack.registry.pin("one", pinned=True),
    }
    caller = asyncio.create_task(changes[change]())
    assert await asyncio.to_thread(begun.wait, 10)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    may_end.set()
    assert await asyncio.to_thread(ended.wait, 10)
    await background(stack)
    served = {adapter.name: adapter.entry for adapter in stack.registry.list()}
    assert served == stack.store.entries()
    assert stored(stack) == known(stack) == {entry.version for entry in served.values()}
    assert list((stack.root.parent / "store" / "tmp").iterdir()) == []


async def test_a_refusal_nobody_waits_for_is_not_logged(stack: Stack, caplog: pytest.LogCaptureFixture) -> None:
    await stack.registry._writing.acquire()
    caller = asyncio.create_task(stack.registry.unload("nobody"))
    await settle()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    stack.registry._writing.release()
    await settle()
    gc.collect()
    assert not stack.registry._background.tasks
    assert not caplog.records


@pytest.mark.parametrize("end", ["unload", "replace", "load unpinned"])
async def test_a_pin_ends_with_the_name_that_has_it_though_another_keeps_the_version(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    folder = str(write_adapter(stack.root / "same"))
    await stack.registry.load("pinned", folder, pin=True)
    version = (await stack.registry.load("other", folder)).version
    told: list[tuple[str, bool]] = []
    monkeypatch.setattr(stack.engine, "pin_adapter", lambda name, *, pinned: told.append((name, pinned)))
    if end == "unload":
        await stack.registry.unload("pinned")
    elif end == "replace":
        await stack.load("pinned", seed=2, replace=True)
    else:
        await stack.registry.load("pinned", folder, replace=True)
    assert told == [(version, False)]


async def test_a_disk_that_fails_a_pin_is_unavailable(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    await stack.load("one")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stack.store, "pin", full)
    with pytest.raises(Unavailable, match="No space left on device"):
        await stack.registry.pin("one", pinned=True)
    assert not stack.registry.get("one").entry.pinned


async def test_pins_are_told_to_the_engine_and_remembered(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    version = await stack.load("one")
    told: list[tuple[str, bool]] = []
    monkeypatch.setattr(stack.engine, "pin_adapter", lambda name, *, pinned: told.append((name, pinned)))
    assert (await stack.registry.pin("one", pinned=True)).entry.pinned
    assert not (await stack.registry.pin("one", pinned=False)).entry.pinned
    assert told == [(version, True), (version, False)]
    with pytest.raises(NotFound):
        await stack.registry.pin("two", pinned=True)


async def test_a_restarted_server_serves_what_it_served(stack: Stack, tmp_path: Path) -> None:
    versions = [await stack.load("one", seed=1), await stack.load("two", seed=2)]
    stack.store.close()
    again = make_stack(tmp_path)
    await again.registry.restore()
    assert [(adapter.name, adapter.version) for adapter in again.registry.list()] == list(
        zip(["one", "two"], versions, strict=True)
    )
    assert known(again) == set(versions)


async def test_what_does_not_fit_the_base_is_kept_but_not_served(stack: Stack, tmp_path: Path) -> None:
    version = await stack.load("one")
    wider = tiny_spec(num_layers=1)
    registry = AdapterRegistry(stack.store, stack.engine, wider, SourcePolicy())
    await registry.restore()
    assert registry.list() == ()
    assert stored(stack) == {version}


async def test_what_can_never_fit_the_adapter_memory_is_refused(stack: Stack) -> None:
    registry = AdapterRegistry(stack.store, stack.engine, tiny_spec(), SourcePolicy((stack.root,)), num_pages=1)
    await registry.load("fits", str(write_adapter(stack.root / "fits", rank=16)))
    with pytest.raises(AdapterRejected, match="rank 17 needs 2 pages of adapter memory, the server has 1; "):
        await registry.load("large", str(write_adapter(stack.root / "large", rank=17)))
    assert stored(stack) == known(stack) == {registry.get("fits").version}

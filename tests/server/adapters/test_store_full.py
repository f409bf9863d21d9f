"""A full disk, at every system call of a load: a clear error, nothing left by halves, and the store goes on."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from perseid_server.adapters.store import AdapterStore, Naming, version_of
from tests.server.adapters.test_store import load, source_of

STEPS = ("fsync", "rename", "link", "mkdir")
"""Calls that a full disk may refuse. Deleting and reading always work."""


def full_at(number: int, patch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """The numbered call, and it alone, finds the disk full. Tells whether there were so many calls."""
    counter = itertools.count()
    failed: list[str] = []

    def failing(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **kwargs: object) -> object:
            if next(counter) == number:
                failed.append(name)
                raise OSError(28, "No space left on device")
            return call(*args, **kwargs)

        return run

    for step in STEPS:
        patch.setattr(os, step, failing(step, getattr(os, step)))
    return lambda: bool(failed)


def test_a_disk_that_is_full_at_any_call_of_a_load_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    for number in itertools.count():
        root = tmp_path / str(number) / "store"
        store = AdapterStore(root)
        old = load(store, root, "a", "x")
        source = source_of(root, "y")
        new = None
        with pytest.MonkeyPatch.context() as patch:
            has_failed = full_at(number, patch)
            try:
                [entry] = store.commit([Naming("a", store.stage(source), "s")])
                new = entry.version
            except OSError as error:
                assert error.errno == 28  # noqa: PT017  at most calls it does not come
        if not has_failed():
            assert new is not None
            assert number > 8, "there were that many calls to fail at"
            store.close()
            return
        served = store.entries()["a"].version
        assert served in {old, version_of(source.path)}
        named = {entry.version for entry in store.entries().values()}
        on_disk = {path.name for path in (root / "versions").iterdir()}
        assert named <= on_disk <= named | {old}, "no version without a name is left"
        assert not list((root / "tmp").glob("manifest.*"))
        assert load(store, root, "b", "z"), "the store goes on"
        store.close()
        again = AdapterStore(root)
        assert again.entries()["a"].version == served
        assert all(version_of(again.folder(one.version)) == one.version for one in again.entries().values())
        again.close()


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.chaos)])
@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "manifest.json"])
def test_a_flip_of_any_byte_costs_its_own_name_at_most(
    file: str, every: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "store"
    store = AdapterStore(root)
    good, bad = load(store, root, "good", "y"), load(store, root, "bad", "x")
    store.close()
    manifests = {path: path.read_bytes() for path in root.glob("manifest*.json")}
    path = root / file if file.startswith("manifest") else store.folder(bad) / file
    whole = path.read_bytes()
    for place, kept in itertools.product(range(0, len(whole), every), (True, False)):
        path.write_bytes(whole[:place] + (bytes([whole[place] ^ 4]) + whole[place + 1 :] if kept else b""))
        caplog.clear()
        opened = AdapterStore(root)
        served = {name: entry.version for name, entry in opened.entries().items()}
        opened.close()
        assert served == {"good": good}
        assert ("'bad' is dropped" if path.parent != root else "manifest.json is damaged") in caplog.text
        for damaged in root.rglob("*.damaged"):
            if damaged.is_dir():
                damaged.rename(store.folder(bad))
            else:
                damaged.unlink()
        path.write_bytes(whole)
        for manifest, content in manifests.items():
            manifest.write_bytes(content)

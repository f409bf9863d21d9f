"""The store names content, replaces and removes in one step, and says what is damaged while it serves the rest."""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from perseid_server.adapters.layout import FILES
from perseid_server.adapters.lora import WEIGHTS_FILE
from perseid_server.adapters.lora_config import CONFIG_FILE
from perseid_server.adapters.manifest import Entry
from perseid_server.adapters.source import AdapterFolder
from perseid_server.adapters.store import AdapterStore, Naming, version_of
from perseid_server.errors import AdapterRejected, Conflict, TooLarge


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> Iterator[AdapterStore]:
    store = AdapterStore(root)
    yield store
    store.close()


def source_of(root: Path, content: str) -> AdapterFolder:
    """A folder with an adapter's two files; the store does not look into them."""
    folder = root.parent / f"source-{content}"
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_FILE).write_text(f'{{"{content}": 1}}')
    (folder / WEIGHTS_FILE).write_text(content * 100)
    return AdapterFolder(folder, follow_links=False)


def load(store: AdapterStore, root: Path, name: str, content: str, *, pinned: bool = False) -> str:
    """Store content under a name; its version."""
    staged = store.stage(source_of(root, content))
    [entry] = store.commit([Naming(name, staged, f"from/{content}", pinned)])
    return entry.version


def reopened(store: AdapterStore, root: Path) -> AdapterStore:
    store.close()
    return AdapterStore(root)


def names(store: AdapterStore) -> dict[str, str]:
    return {name: entry.version for name, entry in store.entries().items()}


def versions_on_disk(root: Path) -> set[str]:
    return {path.name for path in (root / "versions").iterdir()}


def damaged(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*.damaged"))


def test_a_version_is_the_hash_of_its_content(store, root):
    first, again, other = (load(store, root, name, content) for name, content in ("ax", "bx", "cy"))
    assert first == again != other
    assert versions_on_disk(root) == {first, other}
    assert version_of(store.folder(first)) == first
    assert (store.folder(other) / WEIGHTS_FILE).read_text() == "y" * 100


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_both_files_count(file, store, root):
    before = load(store, root, "a", "x")
    source = source_of(root, "x")
    (source.path / file).write_text("another")
    assert store.stage(source).version != before


def test_bytes_that_move_from_one_file_to_the_other_are_another_version(tmp_path):
    for folder, config, weights in (("one", "ab", "c"), ("two", "a", "bc")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / CONFIG_FILE).write_text(config)
        (tmp_path / folder / WEIGHTS_FILE).write_text(weights)
    assert version_of(tmp_path / "one") != version_of(tmp_path / "two")


def test_replacing_moves_the_name_and_keeps_the_old_version_until_it_is_collected(store, root):
    old = load(store, root, "a", "x")
    load(store, root, "b", "z")
    new = load(store, root, "a", "y")
    assert names(store)["a"] == new
    assert list(names(store)) == ["b", "a"], "in the order they were loaded"
    store.collect(in_use={old})
    assert old in versions_on_disk(root)
    store.collect(in_use=())
    assert versions_on_disk(root) == set(names(store).values())


def test_removing_takes_only_the_name(store, root):
    version = load(store, root, "a", "x")
    load(store, root, "b", "x")
    store.remove("a")
    store.collect(in_use=())
    assert names(store) == {"b": version}
    assert versions_on_disk(root) == {version}
    store.remove("b")
    store.collect(in_use=())
    assert versions_on_disk(root) == set()


@pytest.mark.parametrize("change", [lambda store: store.remove("x"), lambda store: store.pin("x", pinned=True)])
def test_an_unknown_name_is_a_key_error(change, store):
    with pytest.raises(KeyError):
        change(store)


def test_names_sources_pins_and_order_survive_a_restart(store, root):
    for name, content in (("b", "x"), ("a", "y"), ("org/c", "z")):
        load(store, root, name, content, pinned=name == "a")
    store.pin("org/c", pinned=True)
    store.pin("a", pinned=False)
    before = list(store.entries().items())
    store = reopened(store, root)
    assert list(store.entries().items()) == before
    assert [(name, entry.pinned, entry.source) for name, entry in before] == [
        ("b", False, "from/x"),
        ("a", False, "from/y"),
        ("org/c", True, "from/z"),
    ]
    store.close()


def test_a_discarded_copy_leaves_nothing(store, root):
    staged = store.stage(source_of(root, "x"))
    store.discard(staged)
    assert not staged.folder.exists()
    assert names(store) == {}
    assert versions_on_disk(root) == set()


@pytest.mark.parametrize("missing", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_source_that_cannot_be_copied_leaves_nothing(missing, store, root):
    source = source_of(root, "x")
    (source.path / missing).unlink()
    with pytest.raises(AdapterRejected, match=f"has no {missing}"):
        store.stage(source)
    assert list((root / "tmp").iterdir()) == []


def test_a_pickle_in_place_of_safetensors_is_refused_with_the_way_out(store, root):
    source = source_of(root, "x")
    (source.path / WEIGHTS_FILE).rename(source.path / "adapter_model.bin")
    with pytest.raises(AdapterRejected, match="safe_serialization=True"):
        store.stage(source)


def test_a_file_beyond_the_limit_is_refused(store, root, monkeypatch):
    monkeypatch.setattr("perseid_server.adapters.sizes.MAX_ADAPTER_BYTES", 50)
    with pytest.raises(TooLarge, match="100 bytes; the limit is 50"):
        store.stage(source_of(root, "x"))


def test_a_second_server_on_the_same_folder_is_refused_and_does_no_harm(store, root):
    version = load(store, root, "a", "x")
    staged = store.stage(source_of(root, "y"))
    with pytest.raises(Conflict, match="in use by another server"):
        AdapterStore(root)
    assert staged.folder.is_dir(), "its tmp/ was not emptied"
    store = reopened(store, root)
    assert names(store) == {"a": version}
    store.close()


# --- gate sets ------------------------------------------------------------------------------------------------------


def gates_of(root: Path, content: str) -> AdapterFolder:
    """A folder with a gate set's two files."""
    folder = root.parent / f"gates-{content}"
    folder.mkdir(exist_ok=True)
    for name in FILES["gates"]:
        (folder / name).write_text(content)
    return AdapterFolder(folder, follow_links=False)


def test_a_gate_set_is_kept_beside_adapters_with_its_kind(store, root):
    adapter = load(store, root, "a", "x")
    [entry] = store.commit([Naming("g", store.stage(gates_of(root, "y")), "s", pinned=True)])
    store = reopened(store, root)
    assert {name: (kept.version, kept.kind, kept.pinned) for name, kept in store.entries().items()} == {
        "a": (adapter, "adapter", False),
        "g": (entry.version, "gates", True),
    }
    assert sorted(path.name for path in store.folder(entry.version).iterdir()) == sorted(FILES["gates"])
    store.close()


def test_what_a_version_is_cannot_be_mistaken(tmp_path):
    """The same bytes as an adapter, a gate set and heads have three versions; a folder with both configs is the
    adapter."""
    for kind in FILES:
        (tmp_path / kind).mkdir()
        for name in FILES[kind]:
            (tmp_path / kind / name).write_text("x")
    versions = {kind: version_of(tmp_path / kind) for kind in FILES}
    assert len(set(versions.values())) == len(FILES)
    for name in FILES["gates"]:
        (tmp_path / "adapter" / name).write_text("y")
    assert version_of(tmp_path / "adapter") == versions["adapter"]


def test_the_hash_of_an_adapter_is_what_it_always_was(tmp_path):
    (tmp_path / CONFIG_FILE).write_text("config")
    (tmp_path / WEIGHTS_FILE).write_text("weights")
    assert version_of(tmp_path) == "8899e79a7f969bfca68337fdd39e12e75857accbf653091116faa6c7f0c850f4"


def test_a_gate_set_without_weights_is_refused_by_the_name_of_the_file(store, root):
    source = gates_of(root, "x")
    (source.path / "gates.safetensors").unlink()
    with pytest.raises(AdapterRejected, match=r"the gate set has no gates\.safetensors"):
        store.stage(source)
    assert list((root / "tmp").iterdir()) == []


def test_several_names_are_given_at_once_or_not_at_all(store, root, monkeypatch):
    load(store, root, "old", "x")
    before = dict(store.entries())
    namings = [Naming("a", store.stage(source_of(root, "y")), "s"), Naming("g", store.stage(gates_of(root, "z")), "s")]
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            store.commit(namings)
    assert store.entries() == before
    store = reopened(store, root)
    assert store.entries() == before
    namings = [
        Naming("old", store.stage(source_of(root, "y")), "s"),
        Naming("g", store.stage(gates_of(root, "z")), "s"),
    ]
    assert [entry.name for entry in store.commit(namings)] == list(store.entries()) == ["old", "g"]
    store.close()


def test_a_manifest_written_before_there_were_gate_sets_is_read(store, root):
    version = load(store, root, "a", "x")
    store.close()
    body = [{"name": "a", "version": version, "source": "s", "loaded_at": 1.5, "pinned": True}]
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (root / "manifest.json").write_text(json.dumps({"schema": 1, "sha256": digest, "adapters": body}))
    store = AdapterStore(root)
    assert store.entries() == {"a": Entry("a", version, "s", 1.5, True, "adapter", None)}
    store.close()


# --- heads ----------------------------------------------------------------------------------------------------------


def heads_of(root: Path, **files: str) -> AdapterFolder:
    """A folder with these files; the store does not look into them."""
    folder = root.parent / f"heads-{len(list(root.parent.iterdir()))}"
    folder.mkdir()
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return AdapterFolder(folder, follow_links=False)


def test_heads_are_kept_with_their_kind_and_whom_they_are_for(store, root):
    staged = store.stage(heads_of(root, medusa_lm_head__safetensors="x", perseid_heads__json="y", readme__md="z"))
    [entry] = store.commit([Naming("h", staged, "s", adapter="a")])
    store = reopened(store, root)
    assert store.entries() == {"h": entry}
    assert (entry.kind, entry.adapter) == ("heads", "a")
    files = {path.name for path in store.folder(entry.version).iterdir()}
    assert files == {"medusa_lm_head.safetensors", "perseid_heads.json"}
    store.close()


def test_what_may_be_missing_counts_where_it_is_there(store, root):
    tensors = {"medusa_lm_head__safetensors": "x"}
    folders = [
        heads_of(root, **tensors),
        heads_of(root, **tensors, perseid_heads__json="y"),
        heads_of(root, **tensors, config__json="y"),
        heads_of(root, **tensors, perseid_heads__json="y", config__json="y"),
        heads_of(root, **tensors, perseid_heads__json="z"),
    ]
    assert len({store.stage(folder).version for folder in folders}) == len(folders)


def test_vllms_file_gets_the_name_that_heads_have_in_the_store(store, root):
    same = store.stage(heads_of(root, medusa_lm_head__safetensors="x", config__json='{"model_type": "medusa"}'))
    staged = store.stage(heads_of(root, model__safetensors="x", config__json='{"model_type": "medusa"}'))
    assert (staged.version, staged.kind) == (same.version, "heads")
    assert (staged.folder / "medusa_lm_head.safetensors").read_text() == "x"


def test_heads_without_tensors_are_refused_by_the_name_of_the_file(store, root):
    with pytest.raises(AdapterRejected, match=r"the heads have no medusa_lm_head\.safetensors"):
        store.stage(heads_of(root, perseid_heads__json="y"))
    assert list((root / "tmp").iterdir()) == []


# --- damage ---------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


def vanish(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("harm", [cut, flip, vanish])
def test_a_damaged_version_is_set_aside_and_the_others_are_served(harm, file, store, root, caplog):
    bad, good = load(store, root, "bad", "x"), load(store, root, "good", "y")
    harm(store.folder(bad) / file)
    store = reopened(store, root)
    assert names(store) == {"good": good}
    assert "'bad' is dropped" in caplog.text
    assert [name.startswith(bad) for name in damaged(root)] == [True]
    assert load(store, root, "bad", "x") == bad, "the same content can be loaded again"
    store = reopened(store, root)
    assert set(names(store)) == {"good", "bad"}
    store.close()


def test_a_version_damaged_while_the_store_is_open_is_replaced_by_loading_it_again(store, root):
    version = load(store, root, "a", "x")
    flip(store.folder(version) / WEIGHTS_FILE)
    assert load(store, root, "a", "x") == version
    assert version_of(store.folder(version)) == version
    assert len(damaged(root)) == 1


def with_schema(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))


def with_another_path(path: Path) -> None:
    path.write_text(path.read_text().replace('"version": "', '"version": "../../'))


BAD_MANIFESTS: dict[str, Callable[[Path], object]] = {
    "cut short": cut,
    "a bit flipped": flip,
    "empty": lambda path: path.write_bytes(b""),
    "a list": lambda path: path.write_bytes(b"[]"),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe"),
    "nested deeply": lambda path: path.write_bytes(b"[" * 100_000),
    "of another schema": with_schema,
    "with another kind": lambda path: path.write_text(path.read_text().replace('"adapter"', '"spell"')),
    "with a path for a version": with_another_path,
}


@pytest.mark.parametrize("harm", BAD_MANIFESTS.values(), ids=BAD_MANIFESTS)
def test_a_damaged_manifest_is_set_aside_and_the_one_before_it_serves(harm, store, root, caplog):
    first = load(store, root, "a", "x")
    load(store, root, "b", "y")
    harm(root / "manifest.json")
    store = reopened(store, root)
    assert names(store) == {"a": first}
    assert "manifest.json is damaged" in caplog.text
    load(store, root, "c", "z")
    store = reopened(store, root)
    assert list(names(store)) == ["a", "c"]
    assert [name.startswith("manifest.json.") for name in damaged(root)] == [True]
    store.close()


def test_with_both_manifests_damaged_the_store_opens_empty_and_keeps_them(store, root, caplog):
    load(store, root, "a", "x")
    load(store, root, "b", "y")
    for manifest in ("manifest.json", "manifest.previous.json"):
        flip(root / manifest)
    store = reopened(store, root)
    assert names(store) == {}
    assert "starts without names" in caplog.text
    assert len(damaged(root)) == 2
    store.close()


def test_a_failed_write_changes_nothing(store, root, monkeypatch):
    version = load(store, root, "a", "x")
    staged = store.stage(source_of(root, "y"))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            store.commit([Naming("a", staged, "s")])
        with pytest.raises(OSError, match="No space"):
            store.remove("a")
    assert names(store) == {"a": version}
    store = reopened(store, root)
    assert names(store) == {"a": version}
    store.close()


def test_opening_sweeps_up_what_an_earlier_run_left(store, root):
    load(store, root, "a", "x")
    store.stage(source_of(root, "y"))
    (root / "tmp" / "manifest.half").write_text("{")
    store = reopened(store, root)
    assert list((root / "tmp").iterdir()) == []
    store.close()


def test_opening_deletes_versions_that_were_never_named(store, root, monkeypatch):
    """A kill between the two leaves one that is whole, and that nobody would ever ask for."""
    version = load(store, root, "a", "x")
    staged = store.stage(source_of(root, "y"))
    staged.folder.rename(root / "versions" / staged.version)
    store = reopened(store, root)
    assert [path.name for path in (root / "versions").iterdir()] == [version]
    store.close()


@pytest.mark.parametrize("lost", ["damaged", "deleted"])
def test_opening_deletes_nothing_that_a_lost_manifest_may_have_named(lost, store, root):
    load(store, root, "a", "x")
    load(store, root, "b", "y")
    harm = flip if lost == "damaged" else Path.unlink
    harm(root / "manifest.json")
    store = reopened(store, root)
    assert list(names(store)) == ["a"]
    assert len(list((root / "versions").iterdir())) == 2
    store.close()


@pytest.mark.parametrize("change", [-1, 1], ids=["grew", "shrank"])
def test_a_file_that_changes_its_size_while_it_is_copied_is_refused(change, store, root, monkeypatch):
    real = os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        """The size that it had before."""
        status = list(real(descriptor))
        status[stat.ST_SIZE] += change
        return os.stat_result(status)

    monkeypatch.setattr("perseid_server.adapters.copying.os.fstat", fstat)
    with pytest.raises(AdapterRejected, match="while it was copied"):
        store.stage(source_of(root, "a"))
    assert not list((root / "tmp").iterdir())

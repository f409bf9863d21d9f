"""What a remote client may name ends at the operator's roots; what the operator names is found or explained."""

import os
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from perseid_server.adapters.hub import HubAccess, HubId
from perseid_server.adapters.lora import WEIGHTS_FILE
from perseid_server.adapters.lora_config import CONFIG_FILE
from perseid_server.adapters.source import OPERATOR, SourcePolicy, resolve_adapter
from perseid_server.adapters.store import AdapterStore
from perseid_server.errors import AdapterRejected, Forbidden, InvalidRequest, NotFound, PerseidError
from tests.server.adapters.folders import write_adapter


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with one adapter; another adapter lies outside."""
    write_adapter(tmp_path / "root" / "team" / "sql")
    write_adapter(tmp_path / "outside")
    write_adapter(tmp_path / "root-2" / "x")  # shares the root's name as a prefix
    return tmp_path / "root"


@pytest.fixture
def remote(root: Path) -> SourcePolicy:
    return SourcePolicy((root,))


@pytest.fixture
def download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Mock:
    """Stands in for the download."""
    fake = Mock(return_value=tmp_path / "hub")
    monkeypatch.setattr("perseid_server.adapters.source.download", fake)
    return fake


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    store = AdapterStore(tmp_path / "store")
    yield store
    store.close()


def refused(source: str, policy: SourcePolicy, kind: type[PerseidError]) -> PerseidError:
    with pytest.raises(PerseidError) as caught:
        resolve_adapter(source, policy)
    assert type(caught.value) is kind, caught.value
    return caught.value


# --- remote clients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["team/sql", "./team/sql", "team/../team/sql", "team//sql/", "{root}/team/sql"])
def test_a_remote_client_may_name_what_lies_below_a_root(source, root, remote):
    folder = resolve_adapter(source.format(root=root), remote)
    assert folder.path == root / "team" / "sql"
    assert not folder.follow_links


def test_every_root_is_searched(root, tmp_path):
    policy = SourcePolicy((tmp_path / "missing", tmp_path / "root-2", root))
    assert resolve_adapter("team/sql", policy).path == root / "team" / "sql"


def test_a_root_that_is_a_link_is_followed_since_the_operator_named_it(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    policy = SourcePolicy((tmp_path / "link",))
    assert resolve_adapter("team/sql", policy).path == root / "team" / "sql"
    assert resolve_adapter(f"{tmp_path}/link/team/sql", policy).path == root / "team" / "sql"


ESCAPES = [
    "../outside",
    "team/../../outside",
    "{top}/outside",
    "{top}/root/../outside",
    "{top}/root-2/x",
    "../root-2/x",
    "/etc",
    "/",
    ".",
    "",
    "..",
    "{top}/root",
    "~",
    "~root",
    "~/adapter",
    "/dev/zero",
    "/proc/self/cwd",
    "file:///etc",
    "https://example.com/adapter",
    "s3://bucket/key",
    "team/sql/adapter_config.json",
    "team/nothing",
    "a" * 300,
    "a/" * 2000,
    "x" * 5000,
    "te\0am",
    "\ud800",
    "team/sql\n",
]


@pytest.mark.parametrize("source", ESCAPES, ids=lambda source: ascii(source[:40]))
def test_a_remote_client_may_name_nothing_else(source, remote, tmp_path):
    with pytest.raises((Forbidden, InvalidRequest)) as caught:
        resolve_adapter(source.format(top=tmp_path), remote)
    assert caught.value.field == "source"
    assert len(caught.value.message) < 500


def test_a_refusal_does_not_tell_what_exists_outside(remote, tmp_path):
    there = refused(f"{tmp_path}/outside", remote, Forbidden).message
    missing = refused(f"{tmp_path}/nowhere", remote, Forbidden).message
    assert there.replace("outside", "nowhere") == missing


def test_without_roots_nothing_local_is_allowed(root):
    refused(str(root / "team" / "sql"), SourcePolicy(), Forbidden)


def link_folder(root: Path, outside: Path) -> str:
    (root / "linked").symlink_to(outside)
    return "linked"


def link_above(root: Path, outside: Path) -> str:
    (root / "up").symlink_to(outside.parent)
    return "up/outside"


def link_inside(root: Path, _: Path) -> str:
    (root / "alias").symlink_to(root / "team")
    return "alias/sql"


def link_loop(root: Path, _: Path) -> str:
    (root / "loop").symlink_to(root / "loop")
    return "loop/x"


def link_file(root: Path, outside: Path) -> str:
    weights = root / "team" / "sql" / WEIGHTS_FILE
    weights.unlink()
    weights.symlink_to(outside / WEIGHTS_FILE)
    return "team/sql"


def fifo(root: Path, _: Path) -> str:
    config = root / "team" / "sql" / CONFIG_FILE
    config.unlink()
    os.mkfifo(config)
    return "team/sql"


def folder_for_file(root: Path, _: Path) -> str:
    config = root / "team" / "sql" / CONFIG_FILE
    config.unlink()
    config.mkdir()
    return "team/sql"


TRICKS = [link_folder, link_above, link_inside, link_loop, link_file, fifo, folder_for_file]


@pytest.mark.parametrize("trick", TRICKS)
def test_links_and_special_files_below_a_root_are_refused(trick, root, remote, tmp_path):
    refused(trick(root, tmp_path / "outside"), remote, Forbidden)


@pytest.mark.parametrize("trick", [link_file, fifo, folder_for_file])
def test_a_trick_played_between_the_check_and_the_copy_is_refused(trick, root, remote, tmp_path, store):
    folder = resolve_adapter("team/sql", remote)
    trick(root, tmp_path / "outside")
    with pytest.raises(AdapterRejected):
        store.stage(folder)


def test_a_folder_swapped_for_a_link_between_the_check_and_the_copy_is_refused(root, remote, tmp_path, store):
    folder = resolve_adapter("team/sql", remote)
    (root / "team").rename(tmp_path / "moved")
    (root / "team").symlink_to(tmp_path / "moved")
    with pytest.raises(AdapterRejected, match="not a regular file of its folder"):
        store.stage(folder)


# --- the hub --------------------------------------------------------------------------------------------------------

HUB_IDS = {
    "org/name": ("org/name", None),
    "Org-1/na.me_2": ("Org-1/na.me_2", None),
    "org/name@main": ("org/name", "main"),
    "org/name@refs/pr/3": ("org/name", "refs/pr/3"),
    "org/name@v1.0-rc": ("org/name", "v1.0-rc"),
}


@pytest.mark.parametrize("source", HUB_IDS)
def test_a_hub_id_is_downloaded_when_it_is_allowed(source, remote, download, tmp_path):
    policy = SourcePolicy(remote.roots, allow_hub=True)
    folder = resolve_adapter(source, policy)
    assert (folder.path, folder.follow_links) == (tmp_path / "hub", True)
    download.assert_called_once_with(HubId(*HUB_IDS[source]), HubAccess())


def test_a_hub_id_is_forbidden_without_the_operators_word(remote, download):
    assert "--allow-hub" in refused("org/name", remote, Forbidden).message
    download.assert_not_called()


def test_a_folder_below_a_root_comes_before_a_hub_id(root, download):
    folder = resolve_adapter("team/sql", SourcePolicy((root,), allow_hub=True))
    assert folder.path == root / "team" / "sql"
    download.assert_not_called()


NO_HUB_IDS = [
    "name",
    "org/name/more",
    "org/.name",
    "../name",
    "org/name@",
    "org/name@..",
    "org/name@../../etc",
    "org/name@a/../../../x",
    "org/name@/etc",
    "org/name@a//b",
    "org/name@.hidden",
    "org/name@-x",
    "org/name@" + "v" * 129,
    "org/name@a b",
    "org/name\n",
    "org/näme",
    "org/name?x=1",
    "org/name#x",
    "org/na%2e%2e",
    "datasets/org/name",
    "https://hf.co/org/name",
    "o" * 97 + "/name",
]


@pytest.mark.parametrize("source", NO_HUB_IDS)
@pytest.mark.parametrize("trusted", [True, False], ids=["operator", "remote"])
def test_what_only_resembles_a_hub_id_is_never_asked_for(source, trusted, download, tmp_path):
    policy = SourcePolicy((tmp_path,), allow_hub=True, trusted=trusted)
    refused(source, policy, NotFound if trusted else Forbidden)
    download.assert_not_called()


# --- the operator ---------------------------------------------------------------------------------------------------


def test_the_operator_may_name_any_folder_and_follow_links(tmp_path, root, monkeypatch):
    (tmp_path / "link").symlink_to(root / "team" / "sql")
    monkeypatch.setenv("HOME", str(root))
    monkeypatch.chdir(root)
    for source in (str(root / "team" / "sql"), str(tmp_path / "link"), "~/team/sql", "team/sql", "./team/../team/sql"):
        folder = resolve_adapter(source, OPERATOR)
        assert (folder.path, folder.follow_links) == (root / "team" / "sql", True)


def loop(folder: Path) -> str:
    (folder / "loop").symlink_to(folder / "loop")
    return str(folder / "loop")


def plain_file(folder: Path) -> str:
    (folder / WEIGHTS_FILE).touch()
    return str(folder / WEIGHTS_FILE)


def pipe(folder: Path) -> str:
    os.mkfifo(folder / "pipe")
    return str(folder / "pipe")


OPERATORS_MISTAKES = {
    "a file": (plain_file, AdapterRejected, "not a folder"),
    "a pipe": (pipe, AdapterRejected, "not a folder"),
    "a device": (lambda _: "/dev/zero", AdapterRejected, "not a folder"),
    "a loop of links": (loop, AdapterRejected, "cannot be read"),
    "a long name": (lambda _: "/" + "a" * 300, AdapterRejected, "cannot be read"),
    "nobody's home": (lambda _: "~no-such-user-here/x", AdapterRejected, "cannot be read"),
    "nothing there": (lambda folder: str(folder / "nowhere"), NotFound, "no such folder"),
    "below a file": (lambda folder: plain_file(folder) + "/x", NotFound, "no such folder"),
    "a URL": (lambda _: "https://example.com/x", NotFound, "no such folder"),
    "half a character": (lambda _: "/\ud800", NotFound, "no such folder"),
    "a NUL": (lambda _: "a\0b", InvalidRequest, "expected a folder"),
    "nothing": (lambda _: "", InvalidRequest, "expected a folder"),
}


@pytest.mark.parametrize("case", OPERATORS_MISTAKES)
def test_the_operators_mistakes_are_explained(case, tmp_path):
    make, kind, words = OPERATORS_MISTAKES[case]
    error = refused(make(tmp_path), OPERATOR, kind)
    assert words in error.message
    assert error.field == "source"


@pytest.mark.parametrize("special", ["pipe", "device", "folder"])
def test_the_operators_special_files_are_refused_without_waiting(special, tmp_path, store):
    folder = write_adapter(tmp_path / "adapter")
    weights = folder / WEIGHTS_FILE
    weights.unlink()
    make = {
        "pipe": lambda: os.mkfifo(weights),
        "device": lambda: weights.symlink_to("/dev/zero"),
        "folder": weights.mkdir,
    }
    make[special]()
    num_open = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(AdapterRejected, match=WEIGHTS_FILE):
        store.stage(resolve_adapter(str(folder), OPERATOR))
    assert len(list(Path("/proc/self/fd").iterdir())) == num_open

"""Keys are added and taken out; what else the file holds, and who may read it, stays."""

import errno
import fcntl
import os
import stat
import tomllib
from datetime import date
from pathlib import Path

import pytest

from perseid_server.access.key_edit import add_key, remove_key
from perseid_server.access.key_file import parse_keys, read_keys
from perseid_server.access.keys import hash_text
from perseid_server.errors import InvalidRequest

HASH = hash_text("secret")
OTHER = hash_text("other")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- who may read it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0, 0o077, 0o277])
def test_a_new_file_is_for_its_owner_alone(umask: int, path: Path) -> None:
    before = os.umask(umask)
    try:
        add_key(path, "a", {})
    finally:
        os.umask(before)
    assert mode(path) == 0o600


@pytest.mark.parametrize("before", [0o640, 0o660, 0o400, 0o644, 0o2640])
def test_who_could_read_the_file_still_can(before: int, path: Path) -> None:
    """A server may read it through its group."""
    add_key(path, "a", {})
    path.chmod(before)
    add_key(path, "b", {})
    assert mode(path) == before & 0o777
    remove_key(path, "b")
    assert mode(path) == before & 0o777


def test_a_group_that_cannot_be_kept_lets_no_other_group_in(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_key(path, "a", {})
    path.chmod(0o640)

    def refuse(_: int, uid: int, gid: int) -> None:
        if gid != -1:
            raise PermissionError

    monkeypatch.setattr(os, "fchown", refuse)
    add_key(path, "b", {})
    assert mode(path) == 0o600


def test_owner_and_group_are_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_key(path, "a", {})
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "fchown", lambda _, uid, gid: told.append((uid, gid)))
    add_key(path, "b", {})
    assert sorted(told) == [(-1, path.stat().st_gid), (path.stat().st_uid, -1)]


def test_the_group_is_kept_though_the_owner_cannot_be(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_key(path, "a", {})
    path.chmod(0o640)
    groups = []

    def refuse(_: int, uid: int, gid: int) -> None:
        if uid != -1:
            raise PermissionError
        groups.append(gid)

    monkeypatch.setattr(os, "fchown", refuse)
    add_key(path, "b", {})
    assert (groups, mode(path)) == ([path.stat().st_gid], 0o640)


def test_a_link_stays_a_link(path: Path, tmp_path: Path) -> None:
    path.symlink_to(tmp_path / "theirs.toml")
    add_key(path, "a", {})
    assert path.is_symlink()
    assert list(read_keys(tmp_path / "theirs.toml").keys) == ["a"]


def test_a_full_disk_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_key(path, "a", {})
    before = path.read_bytes()

    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(InvalidRequest, match="cannot be written: No space left"):
        add_key(path, "b", {})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_changes_wait_for_each_other(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, folder = fcntl.flock, os.open(path.parent, os.O_RDONLY)
    try:
        lock(folder, fcntl.LOCK_EX)
        monkeypatch.setattr(fcntl, "flock", lambda file, how: lock(file, how | fcntl.LOCK_NB))
        with pytest.raises(BlockingIOError):
            add_key(path, "a", {})
    finally:
        os.close(folder)
    add_key(path, "a", {})


# --- what is written ------------------------------------------------------------------------------------------------

ODD = (
    "team-😀",
    "é",
    "\x7f",
    "\x00\x01\x1f\t\b\f\r\n",
    '"\\"',
    "\\u00e9",
    "\u2028[keys.a]\u2029",
    "\x85\x0b\x1c",
    "'''",
    '"""',
    "# no comment",
    "a\nhash = 'x'",
    "\ufeff",
    "\uffff\U0010ffff",
)


@pytest.mark.parametrize("text", ODD)
def test_odd_texts_are_read_as_they_were_given(text: str, path: Path) -> None:
    add_key(path, "a", {})
    secret = add_key(path, "b", {"adapters": [text, "x"]})
    add_key(path, "c", {})
    assert tomllib.loads(path.read_bytes().decode())["keys"]["b"]["adapters"] == [text, "x"]
    found = read_keys(path).find(secret)
    assert found is not None
    assert found.caller.adapters == (text, "x")
    remove_key(path, "b")
    assert list(read_keys(path).keys) == ["a", "c"]


def test_a_tenant_may_have_any_letters(path: Path) -> None:
    add_key(path, "a", {"tenant": "team-😀"})
    assert read_keys(path).keys["a"].caller.tenant == "team-😀"
    assert "team-😀" in path.read_text("utf-8")


@pytest.mark.parametrize("value", ["a\udc80", ["x", "\ud83d"]])
def test_what_is_no_text_is_refused_by_its_field(value: str | list[str], path: Path) -> None:
    """A terminal that does not speak UTF-8."""
    field = "tenant" if isinstance(value, str) else "adapters"
    with pytest.raises(InvalidRequest, match=f"{field}: expected UTF-8") as caught:
        add_key(path, "a", {field: value})
    assert caught.value.field == field
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize(("before", "begins"), [("", "[keys.a]"), ("# x", "# x\n\n["), ("# x\n", "# x\n\n[")])
def test_a_blank_line_is_between_a_key_and_what_stood_there(before: str, begins: str, path: Path) -> None:
    path.write_text(before)
    add_key(path, "a", {})
    assert path.read_text().startswith(begins)


@pytest.mark.parametrize("name", ["", "-a", "_a", "a b", "a.b", "a\n", "ä", "a" * 65])
def test_a_name_that_is_none_is_refused(name: str, path: Path) -> None:
    with pytest.raises(InvalidRequest, match="expected a name of 1 to 64") as caught:
        add_key(path, name, {})
    assert caught.value.field == "name"
    assert "a" * 65 not in caught.value.message


def test_what_is_neither_text_nor_number(path: Path) -> None:
    add_key(path, "a", {"enabled": False, "expires": date(2027, 1, 31), "weight": 2})
    told = tomllib.loads(path.read_text())["keys"]["a"]
    assert (told["enabled"], told["expires"], told["weight"]) == (False, date(2027, 1, 31), 2)


# --- what is taken out ----------------------------------------------------------------------------------------------


def test_comments_of_the_next_key_stay(path: Path) -> None:
    path.write_text(
        f"# all keys\n\n# the web\n[keys.a]\nhash = '{HASH}'  # shown once\n# of a\n\n"
        f"# the batch, nightly\n\n# ask Kim\n[keys.b]\nhash = '{OTHER}'\n\n# the end\n"
    )
    remove_key(path, "a")
    assert path.read_text() == (
        "# all keys\n\n# the web\n# of a\n\n# the batch, nightly\n\n# ask Kim\n"
        f"[keys.b]\nhash = '{OTHER}'\n\n# the end\n"
    )
    remove_key(path, "b")
    assert path.read_text().endswith("# ask Kim\n\n# the end\n")


def test_keys_that_come_and_go_leave_no_gap(path: Path) -> None:
    add_key(path, "a", {})
    add_key(path, "z", {})
    before = path.read_text()
    add_key(path, "b", {})
    remove_key(path, "b")
    assert path.read_text() == before
    remove_key(path, "a")
    assert path.read_text().startswith("[keys.z]")
    remove_key(path, "z")
    assert path.read_text() == ""


def test_a_key_that_is_next_without_a_gap_keeps_the_one_above(path: Path) -> None:
    path.write_text(f"# all keys\n\n[keys.a]\nhash = '{HASH}'\n[keys.b]\nhash = '{OTHER}'\n")
    remove_key(path, "a")
    assert path.read_text() == f"# all keys\n\n[keys.b]\nhash = '{OTHER}'\n"


def test_a_file_may_end_without_a_line_end(path: Path) -> None:
    path.write_text(f"# all keys\n\n[keys.a]\nhash = '{HASH}'")
    remove_key(path, "a")
    assert path.read_text() == "# all keys"


@pytest.mark.parametrize(
    "text",
    [
        f"[keys]\na.hash = '{HASH}'\n",
        f"keys.a.hash = '{HASH}'\n",
        f"keys = {{a = {{hash = '{HASH}'}}}}\n",
        f"[keys.a]\nhash = '{HASH}'\nadapters = [\n'''\n[x''']\n",  # a text's line looks like a table
    ],
)
def test_what_is_no_table_is_left_to_its_owner(text: str, path: Path) -> None:
    path.write_text(text)
    assert list(parse_keys(text, path).keys) == ["a"]
    with pytest.raises(InvalidRequest, match="take it out by hand"):
        remove_key(path, "a")
    assert path.read_text() == text

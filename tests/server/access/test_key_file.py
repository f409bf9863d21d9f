"""The operator's file of keys: read strictly, refused by line and field, changed whole, followed while it changes."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from perseid_server.access import key_file
from perseid_server.access.key_edit import add_key, remove_key
from perseid_server.access.key_file import parse_keys, read_keys
from perseid_server.access.keys import Key, hash_text
from perseid_server.access.watched import WatchedKeys
from perseid_server.errors import Conflict, InvalidRequest, NotFound

HASH = hash_text("secret")
OTHER = hash_text("other")


def test_all_fields(tmp_path: Path) -> None:
    text = f"""
[keys.acme-web]
hash = "{HASH}"
roles = ["generate", "admin"]
tenant = "acme"
adapters = ["acme-*"]
weight = 2
requests_per_minute = 6
tokens_per_minute = 7
tokens_per_day = 8
tokens_total = 9
expires = 2027-01-31
enabled = false
"""
    key = parse_keys(text, tmp_path).keys["acme-web"]
    assert (key.caller.tenant, key.caller.key, key.caller.weight) == ("acme", "acme-web", 2.0)
    assert (key.caller.roles, key.caller.adapters) == ({"generate", "admin"}, ("acme-*",))
    told = key.allowance
    assert (told.requests_per_minute, told.tokens_per_minute, told.tokens_per_day, told.tokens_total) == (6, 7, 8, 9)
    assert (key.expires, key.enabled) == (datetime(2027, 2, 1, tzinfo=UTC), False)


def test_what_is_not_stated(tmp_path: Path) -> None:
    key = parse_keys(f'[keys.a]\nhash = "{HASH}"', tmp_path).keys["a"]
    assert (key.caller.tenant, key.caller.roles, key.caller.adapters) == ("a", {"generate"}, None)
    assert (key.expires, key.enabled) == (None, True)


def test_a_key_is_found_by_what_was_shown(tmp_path: Path) -> None:
    ring = parse_keys(f'[keys.a]\nhash = "{HASH}"\n[keys.b]\nhash = "{OTHER}"', tmp_path)
    assert [found and found.name for found in map(ring.find, ("secret", "other", "no", HASH, "", "x" * 9999))] == [
        "a", "b", None, None, None, None
    ]  # fmt: skip


def test_many_keys_are_not_compared_each_with_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Counted(bytes):
        __hash__ = bytes.__hash__

        def __eq__(self, other: object) -> bool:
            compared.append(other)
            return bytes.__eq__(self, other)

    def counted(name: str, table: dict, original=key_file._key) -> Key:
        made = original(name, table)
        return replace(made, digest=Counted(made.digest))

    compared: list[object] = []
    monkeypatch.setattr(key_file, "_key", counted)
    text = "".join(f'[keys.k{number}]\nhash = "{hash_text(str(number))}"\n' for number in range(100))
    assert len(parse_keys(text, tmp_path).keys) == 100
    assert len(compared) < 100


BROKEN = {
    "no hash": ("[keys.a]\nroles = ['generate']", 1, "keys.a.hash"),
    "the key in place of its hash": ("[keys.a]\nhash = 'psd_topsecret'", 2, "keys.a.hash"),
    "unknown field": (f"[keys.a]\nhash = '{HASH}'\nrole = 'admin'", 3, "keys.a.role"),
    "unknown role": (f"[keys.a]\nhash = '{HASH}'\n\nroles = ['root']", 4, "keys.a.roles"),
    "no role": (f"[keys.a]\nhash = '{HASH}'\nroles = []", 3, "keys.a.roles"),
    "a text for a list": (f"[keys.a]\nadapters = 'x'\nhash = '{HASH}'", 2, "keys.a.adapters"),
    "weight": (f"[keys.a]\nhash = '{HASH}'\nweight = nan", 3, "keys.a.weight"),
    "tiny weight": (f"[keys.a]\nhash = '{HASH}'\nweight = 1e-12", 3, "keys.a.weight"),
    "limit": (f"[keys.a]\nhash = '{HASH}'\ntokens_total = 0", 3, "keys.a.tokens_total"),
    "limit as a truth": (f"[keys.a]\nhash = '{HASH}'\ntokens_total = true", 3, "keys.a.tokens_total"),
    "expiry as a text": (f"[keys.a]\nhash = '{HASH}'\nexpires = '2027-01-31'", 3, "keys.a.expires"),
    "enabled": (f"[keys.a]\nhash = '{HASH}'\nenabled = 'no'", 3, "keys.a.enabled"),
    "two keys alike": (f"[keys.a]\nhash = '{HASH}'\n[keys.b]\nhash = '{HASH}'", 4, "keys.b.hash"),
    "not TOML": (f"[keys.a]\nhash = '{HASH}'\nroles = [", None, "not TOML"),
    "a secret in broken TOML": ("[keys.a]\nhash = psd_topsecret", 2, "not TOML"),
    "a line break in a key": (f"[keys.a]\nhash = '{HASH}'\n\"x\\ny\" = 1", None, "keys.a.x\\ny: unknown"),
    "other tables": ("[users.a]", None, "users"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_by_line_and_field(case: str, tmp_path: Path) -> None:
    text, line, told = BROKEN[case]
    (tmp_path / "keys.toml").write_text(text)
    with pytest.raises(InvalidRequest) as caught:
        read_keys(tmp_path / "keys.toml")
    assert told in caught.value.message
    assert line is None or f"line {line}:" in caught.value.message
    assert "topsecret" not in caught.value.message
    assert caught.value.message.isprintable()


def test_a_new_key_is_written_as_its_hash(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text("# ours\n")
    secret = add_key(path, "a", {"roles": ["admin"], "adapters": ['say "hi"\\*']})
    assert secret not in path.read_text()
    assert path.read_text().startswith("# ours\n")
    found = read_keys(path).find(secret)
    assert found is not None
    assert found.caller.adapters == ('say "hi"\\*',)
    assert [one.name for one in tmp_path.iterdir()] == ["keys.toml"]


def test_what_is_wrong_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    add_key(path, "a", {})
    before = path.read_bytes()
    for name, fields, kind in (("a", {}, Conflict), ("a b", {}, InvalidRequest), ("b", {"weight": 0}, InvalidRequest)):
        with pytest.raises(kind):
            add_key(path, name, fields)
    with pytest.raises(NotFound):
        remove_key(path, "b")
    assert path.read_bytes() == before


def test_a_revoked_key_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    for name in "abc":
        add_key(path, name, {"weight": 2})
    remove_key(path, "b")
    assert list(read_keys(path).keys) == ["a", "c"]
    remove_key(path, "c")
    assert list(read_keys(path).keys) == ["a"]


def test_changes_are_followed_and_broken_ones_are_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys.toml"
    secret = add_key(path, "a", {})
    watched = WatchedKeys(path)
    added = add_key(path, "b", {})
    watched.refresh()
    assert watched.ring.find(added) is not None
    path.write_text("[keys.a]\nhash = 1")
    watched.refresh()
    watched.refresh()
    assert watched.ring.find(secret) is not None
    [told] = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert "line 2: keys.a.hash" in told
    path.unlink()
    watched.refresh()
    assert watched.ring.find(secret) is not None


def test_the_thread_follows_changes(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    secret = add_key(path, "a", {})
    watched = WatchedKeys(path)
    watched.start()
    try:
        remove_key(path, "a")
        while watched.ring.find(secret) is not None:  # the suite's timeout ends it
            pass
    finally:
        watched.stop()


def test_a_file_that_others_can_read_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys.toml"
    add_key(path, "a", {})
    watched = WatchedKeys(path)
    assert not caplog.records
    path.chmod(0o640)
    WatchedKeys(path)
    assert "chmod 600" in caplog.text
    caplog.clear()
    watched.refresh()  # also of one that is opened while the server runs
    assert "chmod 600" in caplog.text

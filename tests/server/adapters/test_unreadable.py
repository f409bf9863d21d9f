"""Files that cannot be read just now are not taken for bad ones, whoever reads them."""

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from perseid_router import gate_set_config
from perseid_server.adapters import gate_loading
from perseid_server.adapters.copying import copy_file
from perseid_server.adapters.gate_residency import GateSource
from perseid_server.adapters.gate_set_file import check_gate_set
from perseid_server.adapters.lora import WEIGHTS_FILE
from perseid_server.adapters.lora_config import CONFIG_FILE, read_lora_config
from perseid_server.adapters.source import AdapterFolder
from perseid_server.adapters.tensor_file import TensorFile
from perseid_server.adapters.untrusted import MAX_CONFIG_BYTES, unreadable
from perseid_server.errors import AdapterRejected, Unavailable
from perseid_server.speculation import heads_folder
from tests.server.adapters.folders import write_adapter
from tests.server.adapters.gate_folders import write_gates
from tests.server.adapters.residency_stage import SPEC

READS: dict[str, Callable[[Path], object]] = {
    "its configuration": read_lora_config,
    "its tensors' header": lambda folder: TensorFile.open(folder / WEIGHTS_FILE),
    "a copy for the store": lambda folder: copy_file(AdapterFolder(folder, False), CONFIG_FILE, folder / "copy"),
    "heads' configuration": lambda folder: heads_folder.read_small(folder / CONFIG_FILE),
}


def fail(*_: object, **__: object) -> None:
    raise OSError(errno.EMFILE, "Too many open files", "/store/secret")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "a")


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_too_many_open_files_say_nothing_against_what_is_read(
    read: Callable[[Path], object], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(Unavailable, match="cannot be read now: Too many open files") as told:
        read(folder)
    assert "secret" not in told.value.message


def test_nor_against_a_tensor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = TensorFile.open(folder / WEIGHTS_FILE)
    name = next(iter(file.tensors))
    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(Unavailable, match=f"{WEIGHTS_FILE} cannot be read now"):
        file.read(name)


def test_a_disk_that_fails_is_not_the_end_of_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.BytesIO):
        def readinto(self, _: object) -> int:
            raise OSError(errno.EIO, "Input/output error")

    file = TensorFile.open(folder / WEIGHTS_FILE)
    monkeypatch.setattr("perseid_server.adapters.tensor_file.open_regular", lambda _: Broken())
    with pytest.raises(Unavailable, match="Input/output error"):
        file.read(next(iter(file.tensors)))


def test_nor_against_a_gate_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gates(tmp_path)
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(Unavailable, match=r"gate_set\.json cannot be read now"):
        check_gate_set(tmp_path, SPEC)


def test_nor_while_its_hash_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_loading, "version_of", fail)
    source = GateSource(write_gates(tmp_path / ("f" * 64)), ("a" * 64, "b" * 64), (None, None), null=True)
    with pytest.raises(Unavailable, match="its files cannot be read now"):
        gate_loading.load_gate_table(SPEC, torch.device("cpu"), source)


def test_what_says_something_of_the_file_lasts() -> None:
    for number in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.ENAMETOOLONG):
        assert isinstance(unreadable("x", OSError(number, "why")), AdapterRejected)
    for number in (errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM):
        assert isinstance(unreadable("x", OSError(number, "why")), Unavailable)


def test_configurations_have_one_limit() -> None:
    assert gate_set_config.MAX_CONFIG_BYTES == MAX_CONFIG_BYTES

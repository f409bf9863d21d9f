"""What somebody who means harm puts below an adapter root is refused before it costs memory, and leaves nothing."""

import contextlib
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from perseid_server.adapters import copying
from perseid_server.adapters.intake import Intake
from perseid_server.adapters.lora import WEIGHTS_FILE, AdapterInfo
from perseid_server.adapters.lora_config import CONFIG_FILE
from perseid_server.adapters.source import AdapterFolder
from perseid_server.adapters.store import AdapterStore, Naming
from perseid_server.errors import AdapterRejected, PerseidError, TooLarge, Unavailable
from tests.fakes import tiny_spec
from tests.server.adapters.hostile import HOSTILE, KINDS, SPECIAL, WORDS, save_noise, write, write_special
from tests.server.stack import write_adapter

MOST_BYTES = 48 << 20
"""What the largest header that is parsed takes, and no more; the files of these tests claim exabytes."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    store = AdapterStore(tmp_path / "store")
    yield store
    store.close()


@pytest.fixture
def intake(store: AdapterStore) -> Intake:
    return Intake(store, tiny_spec(), None, allow_pickle_heads=True)


REFUSALS = AdapterRejected, TooLarge


def open_below(folder: Path) -> list[str]:
    """Files that this process has open there."""
    paths = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed since
            paths.append(str(descriptor.readlink()))
    return [path for path in paths if path.startswith(f"{folder}/")]


def refusal(
    intake: Intake, folder: Path, *, follow_links: bool = False, kinds: tuple[type[PerseidError], ...] = REFUSALS
) -> str:
    with pytest.raises(kinds) as caught:
        intake.take("x", AdapterFolder(folder, follow_links=follow_links))
    assert open_below(folder.parent) == [str(folder.parent / "store" / "lock")]
    assert list((folder.parent / "store" / "tmp").iterdir()) == []
    assert len(caught.value.message) < 1000
    assert str(folder.parent) not in caught.value.message  # where the server keeps things is nothing for a client
    return caught.value.message


@pytest.mark.parametrize("case", HOSTILE)
def test_it_is_refused_without_being_held_in_memory(case: str, intake: Intake, tmp_path: Path) -> None:
    folder = write(case, tmp_path / "source")
    tracemalloc.start()
    try:
        message = refusal(intake, folder)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert WORDS[case] in message
    assert peak < MOST_BYTES


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize(("kind", "file"), [(kind, file) for kind, (_, files) in KINDS.items() for file in files])
def test_what_is_no_file_is_neither_waited_for_nor_read(
    kind: str, file: str, special: str, intake: Intake, tmp_path: Path
) -> None:
    folder = write_special(tmp_path / "source", kind, file, special)
    kinds = (*REFUSALS, Unavailable) if special == "its own memory" else REFUSALS  # it reads as a disk that fails
    for follow_links in (False, True):  # a client's folder, and the operator's
        try:
            refusal(intake, folder, follow_links=follow_links, kinds=kinds)
        except pytest.fail.Exception:  # heads need no config: a link to nothing is as none
            assert (file, special) == ("perseid_heads.json", "a link to itself")


def test_a_rank_beyond_the_sizes_of_the_base_is_served_as_it_is(intake: Intake, tmp_path: Path) -> None:
    hidden = tiny_spec().hidden_size
    folder = write_adapter(tmp_path / "source", rank=2 * hidden)
    [arrival] = intake.take("x", AdapterFolder(folder, follow_links=False))
    assert isinstance(arrival.content, AdapterInfo)
    assert arrival.content.rank == 2 * hidden
    assert arrival.content.num_pages == -(-2 * hidden // 16)


def test_a_hard_link_is_copied_not_shared(intake: Intake, store: AdapterStore, tmp_path: Path) -> None:
    """Whoever can write to the other name changes nothing that is served."""
    outside, folder = write_adapter(tmp_path / "outside"), write_adapter(tmp_path / "source", seed=1)
    (folder / WEIGHTS_FILE).unlink()
    os.link(outside / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    [arrival] = intake.take("x", AdapterFolder(folder, follow_links=False))
    [entry] = store.commit([Naming("x", arrival.staged, "source")])
    with (outside / WEIGHTS_FILE).open("r+b") as file:
        file.write(bytes(8))
    assert isinstance(intake.check(store.folder(entry.version), "adapter"), AdapterInfo)


@pytest.mark.parametrize(("name", "size"), [(WEIGHTS_FILE, 3 << 20), (CONFIG_FILE, 3 << 20)])
@pytest.mark.parametrize("change", ["grows", "shrinks", "becomes a pipe"])
def test_a_file_that_changes_while_it_is_copied_is_refused(
    name: str, size: int, change: str, intake: Intake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_adapter(tmp_path / "source")
    save_noise(folder / name, size)

    def copy(reader, writer, size, told, original=copying._copy):
        path = folder / told
        if told == name and change == "becomes a pipe":
            path.unlink()
            os.mkfifo(path)
        elif told == name:
            os.truncate(path, path.stat().st_size + (1 if change == "grows" else -1))
        original(reader, writer, size, told)

    monkeypatch.setattr(copying, "_copy", copy)
    expected = {"grows": "grew while", "shrinks": "shrank while", "becomes a pipe": "unknown tensor|not valid JSON"}
    message = refusal(intake, folder)
    assert any(words in message for words in expected[change].split("|")), message

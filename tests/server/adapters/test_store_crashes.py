"""Kill -9 at any moment: the store opens, and holds what was promised before the kill and nothing by halves."""

import itertools
import os
import random
import select
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from perseid_server.adapters.layout import FILES, kind_of
from perseid_server.adapters.source import AdapterFolder
from perseid_server.adapters.store import AdapterStore, Naming, version_of

ROUNDS = 15
CONTENTS = "uvwxyz"
GATES = "xz"
"""Of the contents, those that are gate sets."""
State = tuple[tuple[str, str, bool], ...]  # name, content, pinned; in order
Operation = Callable[[AdapterStore], object]


def make_sources(folder: Path, num_bytes: int) -> dict[str, AdapterFolder]:
    sources = {}
    for content in CONTENTS:
        path = folder / content
        path.mkdir(parents=True)
        config, weights = FILES["gates" if content in GATES else "adapter"]
        (path / config).write_text(content)
        (path / weights).write_bytes(content.encode() * num_bytes)
        sources[content] = AdapterFolder(path, follow_links=False)
    return sources


def script(sources: dict[str, AdapterFolder]) -> Iterator[tuple[Operation, State]]:
    """Loads, replacements, pins and removals without end, each with the state it leads to."""

    def load(*named: tuple[str, str]) -> Operation:
        return lambda store: store.commit([Naming(name, store.stage(sources[each]), each) for name, each in named])

    def remove(name: str) -> Operation:
        def run(store: AdapterStore) -> None:
            store.remove(name)
            store.collect(in_use=())

        return run

    names: dict[str, tuple[str, bool]] = {}
    for turn in itertools.count():
        name, content = f"n{turn % 4}", CONTENTS[turn * 5 % len(CONTENTS)]
        names.pop(name, None)
        names[name] = (content, False)
        yield load((name, content)), as_state(names)
        if turn % 2:
            names[name] = (content, True)
            yield lambda store, name=name: store.pin(name, pinned=True), as_state(names)
            both = [("m", CONTENTS[turn % len(CONTENTS)]), ("m.gates", GATES[turn % len(GATES)])]
            for each, content_of in both:
                names.pop(each, None)
                names[each] = (content_of, False)
            yield load(*both), as_state(names)
        if turn % 3 == 2:
            gone = next(iter(names))
            del names[gone]
            yield remove(gone), as_state(names)


def as_state(names: dict[str, tuple[str, bool]]) -> State:
    return tuple((name, content, pinned) for name, (content, pinned) in names.items())


def state_of(store: AdapterStore) -> State:
    return tuple((entry.name, entry.source, entry.pinned) for entry in store.entries().values())


def in_child(work: Callable[[int], None]) -> tuple[int, int]:
    """Fork; the child gets the writing end of a pipe and never comes back. Returns its pid and the reading end."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work(writer)
        finally:
            os._exit(1)
    os.close(writer)
    return pid, reader


def run_script(root: Path, sources: dict[str, AdapterFolder], report: int) -> None:
    """The child's work: each operation that is done is told by one byte."""
    store = AdapterStore(root)
    for operation, _ in script(sources):
        operation(store)
        os.write(report, b".")


def assert_sound(root: Path, sources: dict[str, AdapterFolder], num_done: int) -> None:
    """The state is that of the last operation that was told, or of the one the kill fell into."""
    states = [(), *(state for _, state in itertools.islice(script(sources), num_done + 1))]
    store = AdapterStore(root)
    try:
        assert state_of(store) in states[num_done : num_done + 2]
        for entry in store.entries().values():
            assert version_of(store.folder(entry.version)) == entry.version
            folder = store.folder(entry.version)
            assert (folder / FILES[entry.kind][0]).read_text() == entry.source
            assert entry.kind == kind_of(folder) == ("gates" if entry.source in GATES else "adapter")
        for version in (root / "versions").iterdir():
            assert version_of(version) == version.name, "named or not, a version is whole"
        assert list((root / "tmp").iterdir()) == []
        assert list(root.rglob("*.damaged")) == []
        assert {path.name for path in root.iterdir()} <= {
            "versions", "tmp", "lock", "manifest.json", "manifest.previous.json"
        }  # fmt: skip
    finally:
        store.close()


def wait_for_byte(reader: int) -> None:
    assert select.select([reader], [], [], 30)[0], "the child did nothing"
    assert os.read(reader, 1) == b".", "the child failed by itself"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, AdapterFolder]:
    return make_sources(tmp_path_factory.mktemp("sources"), num_bytes=3_000_000)


def test_kill_at_random_moments(sources, tmp_path):
    moments = random.Random(3)
    for round_number in range(ROUNDS):
        root = tmp_path / str(round_number)
        pid, reader = in_child(lambda report, root=root: run_script(root, sources, report))
        wait_for_byte(reader)
        select.select([], [], [], moments.uniform(0, 0.15))  # the moment is the point: nothing to wait for
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), "the child failed by itself"
        num_done = len(os.read(reader, 1 << 16)) + 1
        os.close(reader)
        assert_sound(root, sources, num_done)
        shutil.rmtree(root)


STEPS = ("fsync", "rename", "link", "unlink", "mkdir", "rmdir", "open")
"""Calls into the system that change the disk; pathlib and shutil end in them too."""


def kill_before_step(number: int) -> None:
    """From here on in this process: SIGKILL in place of the numbered system call."""
    counter = itertools.count()

    def deadly(call: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **kwargs: object) -> object:
            if next(counter) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return run

    for step in STEPS:
        setattr(os, step, deadly(getattr(os, step)))


def test_kill_before_every_system_call_of_a_load_a_replacement_and_a_removal(tmp_path):
    sources = make_sources(tmp_path / "sources", num_bytes=5)
    num_operations = 6  # load, load, pin, load two at once, load, remove

    def work(number: int, root: Path, report: int) -> None:
        store = AdapterStore(root)
        kill_before_step(number)
        for operation, _ in itertools.islice(script(sources), num_operations):
            operation(store)
            os.write(report, b".")
        os._exit(0)

    for number in itertools.count():
        root = tmp_path / "store"
        pid, reader = in_child(lambda report, number=number, root=root: work(number, root, report))
        _, status = os.waitpid(pid, 0)
        num_done = len(os.read(reader, 64))
        os.close(reader)
        assert_sound(root, sources, num_done)
        shutil.rmtree(root)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            assert num_done == num_operations
            assert number > 40, "there were that many steps to die before"
            return

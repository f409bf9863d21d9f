"""An adapter's folder that is deleted, or turns into a link, while it is loaded and after: at every look that the
loader takes at the file system, over both transports.
"""

import asyncio
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from perseid_server.adapters.store import version_of
from tests.chaos.admin import INVALID, OK, TRANSPORTS, Admin
from tests.chaos.asking import Ask, clients_of
from tests.fakes import expected
from tests.server.stack import LiveStack, make_stack, serving, stored, write_adapter

LOOKS = ("stat", "lstat", "open", "scandir", "listdir", "readlink")
WEIGHTS = "adapter_model.safetensors"
Change = Callable[[Path, Path], None]


def delete(folder: Path, _: Path) -> None:
    shutil.rmtree(folder)


def delete_a_file(folder: Path, _: Path) -> None:
    (folder / WEIGHTS).unlink()


def become_a_link(folder: Path, outside: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(outside)


def link_a_file(folder: Path, outside: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(outside / WEIGHTS)


def link_the_parent(folder: Path, outside: Path) -> None:
    folder.parent.rename(f"{folder.parent}-moved")
    folder.parent.symlink_to(outside.parent)


class Changing:
    """The numbered look at a folder or what lies in it finds it changed just before."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, number: int, change: Callable[[], None]) -> None:
        self._within, self._number, self._change = str(folder), number, change
        self._counter = itertools.count()
        self.has_changed = False
        for look in LOOKS:
            patch.setattr(os, look, self._changing(getattr(os, look)))

    def _changing(self, call: Callable[..., object]) -> Callable[..., object]:
        def run(path: object, *args: object, **kwargs: object) -> object:
            is_looked_at = isinstance(path, str | Path) and str(path).startswith(self._within)
            if is_looked_at and not self.has_changed and next(self._counter) == self._number:
                self.has_changed = True
                self._change()
            return call(path, *args, **kwargs)

        return run


@pytest.mark.parametrize("change", [delete, delete_a_file, become_a_link, link_a_file, link_the_parent])
async def test_while_it_is_loaded(change: Change, tmp_path: Path) -> None:
    """It is loaded as it was, or refused; what lies outside of the root is never read in its place."""
    stack = make_stack(tmp_path)
    outside = write_adapter(tmp_path / "outside" / "team" / "one", seed=66)
    async with serving(stack) as live:
        asked = Admin(live.url, live.grpc)
        assert await _told(asked, "http", "old", write_adapter(stack.root / "old", seed=1)) == (OK, "")
        before = stored(stack)
        statuses = []
        for number in itertools.count():
            folder = write_adapter(tmp_path / "adapters" / str(number) / "one", seed=2)
            whole = version_of(folder)
            with pytest.MonkeyPatch.context() as patch:
                changing = Changing(patch, folder, number, lambda folder=folder: change(folder, outside))
                transport = TRANSPORTS[number % 2]
                status, message = await _told(asked, transport, "one", folder)
            statuses.append(status)
            assert status in {OK, INVALID}, message
            assert stored(stack) == before | ({whole} if status == OK else set())
            assert not list((tmp_path / "store" / "tmp").iterdir())
            if status == OK:
                await asyncio.to_thread(asked.unload, transport, "one")
            if not changing.has_changed:
                break
        assert statuses[-1] == OK, "the last was not disturbed"
        assert statuses.count(INVALID) > 5, "there were that many looks"
        await _goes_on(live, "old", before)


async def test_after_it_was_loaded(tmp_path: Path) -> None:
    """What is served is the store's copy."""
    stack = make_stack(tmp_path)
    async with serving(stack) as live:
        folder = write_adapter(stack.root / "one", seed=1)
        assert await _told(Admin(live.url, live.grpc), "grpc", "one", folder) == (OK, "")
        shutil.rmtree(folder)
        folder.symlink_to(tmp_path)
        await _goes_on(live, "one", stored(stack))


async def _told(asked: Admin, transport: str, name: str, folder: Path) -> tuple[str, str]:
    told = await asyncio.to_thread(asked.load, transport, name, folder)
    return told.status, told.message


async def _goes_on(live: LiveStack, name: str, versions: set[str]) -> None:
    [version] = versions
    async with clients_of(live.url, live.grpc) as clients:
        for transport in ("http", "grpc"):
            answer = await clients.ask(Ask(transport, False, name, "say", 8))
            assert answer.text == bytes(expected(tuple(b"say"), version, 8)).decode()

"""Adapters, gate sets and Medusa heads on disk: content-addressed versions, and a manifest that names them.

    versions/<sha256>/      adapter_config.json, adapter_model.safetensors; or gate_set.json, gates.safetensors;
                            or medusa_lm_head.safetensors with perseid_heads.json and config.json where there are such
    manifest.json           name → version, where it came from, pinned, order, whom heads are for
    manifest.previous.json  the manifest before that
    *.damaged               what was found damaged and set aside; nothing reads it, and nothing deletes it
    tmp/                    versions and manifests on their way in
    lock                    held by the server that uses the store

Everything is written under a temporary name, fsynced, and renamed, so a kill at any moment leaves either the old
state or the new. A version is the hash of its files: what was loaded can never change under its name, and the
hash is checked again whenever the files are read into memory. Standard library only.
"""

import fcntl
import hashlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from perseid_server.adapters.copying import copy_file
from perseid_server.adapters.layout import FILES, OPTIONAL_FILES, Kind, files_of, kind_of
from perseid_server.adapters.manifest import Entry, parse_manifest, render_manifest
from perseid_server.adapters.source import AdapterFolder
from perseid_server.errors import Conflict

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Staged:
    """A copy in tmp/, hashed, not yet named."""

    folder: Path
    version: str
    kind: Kind = "adapter"


@dataclass(frozen=True, slots=True)
class Naming:
    """A staged copy and the name it shall have."""

    name: str
    staged: Staged
    source: str
    pinned: bool = False
    adapter: str | None = None  # whom heads are for, by name


def version_of(folder: Path) -> str:
    """Content hash of a folder: SHA-256 over the SHA-256 of its files, in the order of FILES.

    The hash of what is not an adapter begins with its kind, so that no version can be both. Files that may be missing
    count with their names.
    """
    kind = kind_of(folder)
    total = hashlib.sha256(b"" if kind == "adapter" else kind.encode())
    for name in FILES[kind]:
        total.update(_digest(folder / name))
    for name in OPTIONAL_FILES[kind]:
        if (folder / name).exists():
            total.update(name.encode() + _digest(folder / name))
    return total.hexdigest()


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


class AdapterStore:
    """One server's store. Calls may block on the disk; the caller serialises those that change the manifest."""

    def __init__(self, root: Path) -> None:
        """Open or make a store. Conflict when another server has it open."""
        self._root = root
        self._versions = root / "versions"
        self._tmp = root / "tmp"
        for folder in (root, self._versions, self._tmp):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        shutil.rmtree(self._tmp)
        self._tmp.mkdir()
        is_known = self._manifest.exists()
        self._entries = self._recover()
        if is_known and not any(root.glob("manifest*.damaged")):  # a manifest that is lost may have named more
            self.collect(())

    def close(self) -> None:
        """Let another server have the store."""
        self._lock.close()

    def entries(self) -> Mapping[str, Entry]:
        """All names, in the order they were loaded."""
        return dict(self._entries)

    def folder(self, version: str) -> Path:
        """Where a version's files lie."""
        return self._versions / version

    def stage(self, source: AdapterFolder) -> Staged:
        """Copy the files of an adapter, a gate set or heads into tmp/ and hash what was copied.

        AdapterRejected when one cannot be read.
        """
        return self._staged(self.copy_in(source, files_of(source.path)))

    def copy_in(self, source: AdapterFolder, files: Mapping[str, str]) -> Path:
        """A folder in tmp/ with copies of these files, under other names. AdapterRejected when one cannot be read."""
        folder = self.new_folder()
        try:
            for name, copied_as in files.items():
                copy_file(source, name, folder / copied_as)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder

    def new_folder(self) -> Path:
        """An empty folder in tmp/."""
        folder = self._tmp / uuid.uuid4().hex
        folder.mkdir()
        return folder

    def adopt(self, folder: Path) -> Staged:
        """Stage a folder that was written below tmp/, which loses it."""
        target = self._tmp / uuid.uuid4().hex
        folder.rename(target)
        return self._staged(target)

    def _staged(self, folder: Path) -> Staged:
        """Nothing is left in tmp/ where this fails, for instance because the disk is full."""
        try:
            for path in folder.iterdir():
                _sync(path)
            return Staged(folder, version_of(folder), kind_of(folder))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def discard(self, staged: Staged) -> None:
        """Forget a staged copy."""
        shutil.rmtree(staged.folder, ignore_errors=True)

    def commit(self, namings: Sequence[Naming]) -> tuple[Entry, ...]:
        """Give staged copies their places and their names, all at once; an older version under a name loses it."""
        now = time.time()
        named = {
            one.name: Entry(one.name, one.staged.version, one.source, now, one.pinned, one.staged.kind, one.adapter)
            for one in namings
        }
        moved_in: list[Path] = []
        try:
            for one in namings:
                moved_in += self._move_in(one.staged)
            _sync(self._versions)
            kept = {name: entry for name, entry in self._entries.items() if name not in named}
            self._write({**kept, **named})
        except BaseException:
            self._take_back(moved_in)
            raise
        return tuple(named.values())

    def _take_back(self, moved_in: Sequence[Path]) -> None:
        """Delete versions that got no name after all: on a full disk each try would leave another."""
        named = {entry.version for entry in self._entries.values()}
        for folder in moved_in:
            if folder.name not in named:
                shutil.rmtree(folder, ignore_errors=True)

    def _move_in(self, staged: Staged) -> list[Path]:
        """The folder, where there was none of that version before."""
        target = self.folder(staged.version)
        if target.exists() and not _is_intact(target, staged.version):
            self._set_aside(target)
        if target.exists():
            self.discard(staged)
            return []
        _sync(staged.folder)
        staged.folder.rename(target)
        return [target]

    def pin(self, name: str, *, pinned: bool) -> Entry:
        """Remember whether a name is pinned. KeyError for an unknown name."""
        entry = replace(self._entries[name], pinned=pinned)
        self._write({**self._entries, name: entry})
        return entry

    def remove(self, name: str) -> None:
        """Take a name away; its version stays until `collect`. KeyError for an unknown name."""
        entries = dict(self._entries)
        del entries[name]
        self._write(entries)

    def collect(self, in_use: Collection[str]) -> None:
        """Delete versions that neither a name nor a running request uses."""
        kept = {entry.version for entry in self._entries.values()} | set(in_use)
        for folder in self._versions.iterdir():
            if folder.name not in kept and not folder.name.endswith(".damaged"):
                doomed = self._tmp / uuid.uuid4().hex
                folder.rename(doomed)  # at once, so that a kill leaves no half version
                shutil.rmtree(doomed, ignore_errors=True)

    # --- recovery -----------------------------------------------------------------------------------------------

    def _take_lock(self) -> TextIO:
        lock = (self._root / "lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise Conflict(
                f"the adapter store {self._root} is in use by another server; give this one its own with --store"
            ) from None
        return lock

    def _recover(self) -> dict[str, Entry]:
        entries = self._read_manifests()
        whole = {}
        for name, entry in entries.items():
            folder = self.folder(entry.version)
            if folder.is_dir() and _is_intact(folder, entry.version):
                whole[name] = entry
                continue
            logger.warning("%r is dropped: its version %s is missing or damaged", name, entry.version[:12])
            if folder.is_dir():
                self._set_aside(folder)
        if whole != entries:
            self._write(whole)
        return whole

    def _read_manifests(self) -> dict[str, Entry]:
        damaged = False
        for path in (self._manifest, self._previous):
            try:
                return parse_manifest(path.read_bytes())
            except FileNotFoundError:
                continue
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                logger.warning("%s is damaged (%s) and set aside", path.name, error)
                self._set_aside(path)
                damaged = True
        if damaged:
            logger.error("no manifest in %s can be read; the store starts without names", self._root)
        return {}

    def _set_aside(self, path: Path) -> None:
        path.rename(path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.damaged"))

    # --- manifest -----------------------------------------------------------------------------------------------

    @property
    def _manifest(self) -> Path:
        return self._root / "manifest.json"

    @property
    def _previous(self) -> Path:
        return self._root / "manifest.previous.json"

    def _write(self, entries: Mapping[str, Entry]) -> None:
        """Replace the manifest; the old one becomes the previous one. The state in memory changes last."""
        temporary = self._tmp / f"manifest.{uuid.uuid4().hex}"
        try:
            with temporary.open("wb") as file:
                file.write(render_manifest(entries))
                file.flush()
                os.fsync(file.fileno())
            if self._manifest.exists():
                self._previous.unlink(missing_ok=True)
                os.link(self._manifest, self._previous)
            temporary.rename(self._manifest)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._entries = dict(entries)  # that is on the disk now, whether the folder's sync below succeeds or not
        _sync(self._root)


def _is_intact(folder: Path, version: str) -> bool:
    try:
        return version_of(folder) == version
    except OSError:
        return False


def _sync(path: Path) -> None:
    """Let a folder's names, or a file's content, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

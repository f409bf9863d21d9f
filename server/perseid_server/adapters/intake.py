"""Bringing adapters, gate sets and heads in: copied into the store's tmp/, hashed, and held against the base.

NumPy only; everything here may block on the disk.
"""

import contextlib
import logging
import shutil
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from perseid_router.gate_set import GateSetConfig
from perseid_router.request_router import RequestRouter
from perseid_server.adapters.gate_set_file import GateSetInfo, check_gate_set
from perseid_server.adapters.layout import METEORA_FILES, OPTIONAL_FILES, Kind, kind_of
from perseid_server.adapters.lora import AdapterInfo, check_adapter
from perseid_server.adapters.lora_config import CONFIG_FILE
from perseid_server.adapters.meteora import is_meteora, split_meteora
from perseid_server.adapters.names import check_name
from perseid_server.adapters.source import AdapterFolder
from perseid_server.adapters.store import AdapterStore, Staged
from perseid_server.errors import AdapterRejected
from perseid_server.model.spec import BaseSpec
from perseid_server.speculation.heads_file import HeadsInfo, check_heads
from perseid_server.speculation.heads_folder import PICKLE_FILE, is_pickled
from perseid_server.speculation.pickled_heads import unpickle_heads

logger = logging.getLogger(__name__)

_WHY_CONFIG = "its tensors tell neither the adapters' ranks nor their scales"


@dataclass(frozen=True, slots=True)
class GateSetContent:
    """What the API process keeps of a gate set."""

    config: GateSetConfig
    info: GateSetInfo
    router: RequestRouter | None  # chooses once for a whole request


Content = AdapterInfo | GateSetContent | HeadsInfo


@dataclass(frozen=True, slots=True)
class Arrival:
    """What has been checked and waits to be given its name."""

    name: str
    staged: Staged
    content: Content


class Intake:
    """What one base, with so much adapter memory, takes in."""

    def __init__(
        self, store: AdapterStore, base: BaseSpec, num_pages: int | None, *, allow_pickle_heads: bool = False
    ) -> None:
        """`num_pages`: adapter memory on the device; what can never fit is refused. None: as much as needed.
        `allow_pickle_heads`: read Medusa v1's pickles."""
        self._allow_pickle_heads = allow_pickle_heads
        self._store = store
        self._base = base
        self._num_pages = num_pages

    def take(self, name: str, source: AdapterFolder) -> tuple[Arrival, ...]:
        """All that a folder brings, the one called `name` last: a MeteoRA checkpoint brings its adapters too.

        AdapterRejected says why not; nothing is left in tmp/ then.
        """
        arrivals: list[Arrival] = []
        try:
            with contextlib.closing(self._stage(name, source)) as stagings:
                for each, staged in stagings:
                    try:
                        arrivals.append(Arrival(each, staged, self.check(staged.folder, staged.kind)))
                    except BaseException:
                        self._store.discard(staged)
                        raise
        except BaseException:
            self.discard(arrivals)
            raise
        return tuple(arrivals)

    def discard(self, arrivals: Sequence[Arrival]) -> None:
        """Let go of what is not given a name."""
        for arrival in arrivals:
            self._store.discard(arrival.staged)

    def check(self, folder: Path, kind: Kind) -> Content:
        """Hold a folder of the store against the base."""
        if kind == "gates":
            checked = check_gate_set(folder, self._base)
            return GateSetContent(checked.config, checked.info, checked.request_router())
        if kind == "heads":
            return check_heads(folder, self._base).info
        info = check_adapter(folder, self._base).info
        needed = info.num_pages
        if self._num_pages is not None and needed > self._num_pages:
            raise AdapterRejected(
                f"rank {info.rank} needs {needed} pages of adapter memory, the server has {self._num_pages}; "
                "raise --adapter-memory"
            )
        return info

    def _stage(self, name: str, source: AdapterFolder) -> Generator[tuple[str, Staged]]:
        if is_checkpoint(source.path):
            yield from self._stage_checkpoint(name, source)
        elif self._allow_pickle_heads and kind_of(source.path) == "heads" and is_pickled(source.path):
            yield name, self._stage_pickled(source)
        else:
            yield name, self._store.stage(source)

    def _stage_checkpoint(self, name: str, source: AdapterFolder) -> Generator[tuple[str, Staged]]:
        scratch = self._store.new_folder()
        try:
            copy = self._store.copy_in(source, {file: file for file in METEORA_FILES})
            copy.rename(scratch / "checkpoint")
            parts = split_meteora(scratch / "checkpoint", scratch / "parts", self._base)
            for warning in parts.warnings:
                logger.warning("%s: %s", name, warning)
            for adapter, folder in parts.adapter_folders.items():
                yield check_name(f"{name}.{adapter}", taken=frozenset({self._base.name})), self._store.adopt(folder)
            yield name, self._store.adopt(parts.gate_set_folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _stage_pickled(self, source: AdapterFolder) -> Staged:
        others = [file for file in OPTIONAL_FILES["heads"] if (source.path / file).exists()]
        copy = self._store.copy_in(source, {file: file for file in (PICKLE_FILE, *others)})
        try:
            unpickle_heads(copy)
            return self._store.adopt(copy)
        except BaseException:
            shutil.rmtree(copy, ignore_errors=True)
            raise


def is_checkpoint(folder: Path) -> bool:
    """Whether what a folder brings is a MeteoRA checkpoint. AdapterRejected for one that lacks its meteora.json."""
    if kind_of(folder) != "adapter" or (folder / CONFIG_FILE).exists() or not is_meteora(folder):
        return False
    if not (folder / METEORA_FILES[0]).exists():
        raise AdapterRejected(f"a MeteoRA checkpoint needs {METEORA_FILES[0]} beside {METEORA_FILES[1]}: {_WHY_CONFIG}")
    return True

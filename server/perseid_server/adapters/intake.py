"""Bringing adapters and gate sets in: copied into the store's tmp/, hashed, and held against the base.

NumPy only; everything here may block on the disk.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from perseid_router.gate_set import GateSetConfig
from perseid_router.request_router import RequestRouter
from perseid_server.adapters.gate_set_file import GateSetInfo, check_gate_set
from perseid_server.adapters.layout import Kind
from perseid_server.adapters.lora import AdapterInfo, check_adapter
from perseid_server.adapters.source import AdapterFolder
from perseid_server.adapters.store import AdapterStore, Staged
from perseid_server.errors import AdapterRejected
from perseid_server.model.spec import BaseSpec


@dataclass(frozen=True, slots=True)
class GateSetContent:
    """What the API process keeps of a gate set."""

    config: GateSetConfig
    info: GateSetInfo
    router: RequestRouter | None  # chooses once for a whole request


Content = AdapterInfo | GateSetContent


@dataclass(frozen=True, slots=True)
class Arrival:
    """What has been checked and waits to be given its name."""

    name: str
    staged: Staged
    content: Content


class Intake:
    """What one base, with so much adapter memory, takes in."""

    def __init__(self, store: AdapterStore, base: BaseSpec, num_pages: int | None) -> None:
        """`num_pages`: adapter memory on the device; what can never fit is refused. None: as much as needed."""
        self._store = store
        self._base = base
        self._num_pages = num_pages

    def take(self, name: str, source: AdapterFolder) -> tuple[Arrival, ...]:
        """All that a folder brings, the one called `name` last: a MeteoRA checkpoint brings its adapters too.

        AdapterRejected says why not; nothing is left in tmp/ then.
        """
        arrivals: list[Arrival] = []
        try:
            for each, staged in self._stage(name, source):
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
        info = check_adapter(folder, self._base).info
        needed = info.num_pages
        if self._num_pages is not None and needed > self._num_pages:
            raise AdapterRejected(
                f"rank {info.rank} needs {needed} pages of adapter memory, the server has {self._num_pages}; "
                "raise --adapter-memory"
            )
        return info

    def _stage(self, name: str, source: AdapterFolder) -> Iterator[tuple[str, Staged]]:
        yield name, self._store.stage(source)

"""A residency over a small pool, for the tests."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from perseid_server.adapters.lora import check_adapter
from perseid_server.adapters.lowering import lower
from perseid_server.adapters.pool import AdapterPool
from perseid_server.adapters.residency import Residency
from perseid_server.adapters.state import ResidencyEvents
from perseid_server.adapters.store import version_of
from tests.fakes import tiny_spec
from tests.server.adapters.folders import write_adapter

SPEC = tiny_spec()


@dataclass
class Stage:
    """A residency over a small pool, adapters made as they are needed."""

    folder: Path
    pool: AdapterPool
    residency: Residency
    folders: dict[str, Path] = field(default_factory=dict)

    def adapter(self, seed: int, *, rank: int = 4) -> str:
        """A registered version."""
        folder = write_adapter(self.folder / f"{seed}-{rank}", seed=seed, rank=rank)
        version = version_of(folder)
        self.folders[version] = folder
        self.residency.register(version, str(folder))
        return version

    def settle(self) -> ResidencyEvents:
        """Poll until the loader has nothing to do; all that happened."""
        moved, failed = set(), {}
        while True:
            events = self.residency.poll()
            moved |= set(events.moved)
            failed |= events.failed
            if not self.residency.is_loading:
                return ResidencyEvents(tuple(moved), failed)
            time.sleep(0)

    def use(self, version: str) -> None:
        """Acquire a version that there is room for."""
        if self.residency.acquire(version) != "ready":
            self.settle()
            assert self.residency.acquire(version) == "ready"

    def touch(self, version: str) -> None:
        """Use a version and let it go."""
        self.use(version)
        self.residency.release(version)

    def places(self, *versions: str) -> list[str]:
        return [self.residency.location(version) for version in versions]

    def assert_pages_hold(self, version: str) -> None:
        pages = self.residency._adapters[version].pages
        for linear in lower(check_adapter(self.folders[version], SPEC), SPEC):
            stored = self.pool.layers[linear.layer][linear.fused].b[list(pages)]
            assert torch.equal(stored, torch.from_numpy(linear.b))

    def host_bytes_of(self, version: str) -> int:
        """What its copy in host memory takes."""
        copy = self.residency._host.get(version)
        assert copy is not None
        return copy.nbytes

"""Adapters and gate sets behind one port: a request takes all it needs, or nothing."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from perseid_kernels.routing import GateTable
from perseid_kernels.segments import PageList
from perseid_server.adapters.backoff import soonest
from perseid_server.adapters.gate_residency import GateResidency, GateSource
from perseid_server.adapters.residency import Residency
from perseid_server.adapters.state import Admission, Location, ResidencyEvents, ResidencyStats, Resident


class Residents:
    """Implements `engine.ports.Residency`. All calls come from the engine's thread."""

    def __init__(self, adapters: Residency, gates: GateResidency) -> None:
        self._adapters = adapters
        self._gates = gates

    # --- names --------------------------------------------------------------------------------------------------

    def register(self, version: str, path: str) -> None:
        """Make an adapter known."""
        self._adapters.register(version, path)

    def register_gate_set(
        self, version: str, path: str | None, adapters: Sequence[str], *, null: bool, pinned: bool
    ) -> None:
        """Make a gate set known."""
        folders = tuple(self._adapters.folder(adapter) for adapter in adapters)
        source = GateSource(Path(path) if path is not None else None, tuple(adapters), folders, null)
        self._gates.register(version, source, pinned=pinned)

    def forget(self, version: str) -> None:
        """Let one go with its last user."""
        self._of(version).forget(version)

    def pin(self, version: str, pinned: bool) -> None:
        """Keep one on the device, or let it go."""
        self._of(version).pin(version, pinned)

    def knows(self, version: str) -> bool:
        """Whether it is registered."""
        return self._of(version).knows(version)

    def is_pinned(self, version: str) -> bool:
        """Whether it is pinned."""
        return self._of(version).is_pinned(version)

    def location(self, version: str) -> Location:
        """Where it is."""
        return self._of(version).location(version)

    def error(self, version: str) -> str | None:
        """Why it cannot be loaded."""
        return self._of(version).error(version)

    def problem(self, *versions: str) -> str | None:
        """Why these cannot be on the device together, beside what is pinned now."""
        gate_sets, adapters = self._sorted(versions)
        errors = (*(self._gates.problem(version) for version in gate_sets), self._adapters.problem(*adapters))
        return next((error for error in errors if error is not None), None)

    # --- use ----------------------------------------------------------------------------------------------------

    @property
    def is_loading(self) -> bool:
        """Whether a poll will take something over."""
        return self._adapters.is_loading or self._gates.is_loading

    def acquire(self, *versions: str, evict_wanted: bool = True) -> Admission:
        """Take a reference to each if all are on the device; otherwise none, and see that they come there."""
        gate_sets, adapters = self._sorted(versions)
        found: dict[str, Admission] = {version: self._gates.acquire(version) for version in gate_sets}
        worst: Admission = min([*found.values(), "ready"], key=_WORST_FIRST.index)
        if worst == "ready":
            worst = self._adapters.acquire(*adapters, evict_wanted=evict_wanted)
        elif evict_wanted:  # meanwhile they come closer
            self._adapters.claim(*adapters)
        if worst != "ready":
            for version, admission in found.items():
                if admission == "ready":
                    self._gates.release(version)
        return worst

    def has_room(self, *versions: str, without: Sequence[str]) -> bool:
        """Whether there were room for all these if nobody used those in `without`. Gate sets always have room."""
        _, adapters = self._sorted(versions)
        return self._adapters.has_room(*adapters, without=without)

    def release(self, *versions: str) -> None:
        """Give references back."""
        gate_sets, adapters = self._sorted(versions)
        for version in gate_sets:
            self._gates.release(version)
        self._adapters.release(*adapters)

    def prefetch(self, *versions: str, claimed: Sequence[str] = ()) -> None:
        """What those who wait need, the next first, and whoever has the claim: bring it closer ahead of its turn."""
        gate_sets, adapters = self._sorted(versions)
        claimed_sets, claimed_adapters = self._sorted(claimed)
        for version in (*claimed_sets, *gate_sets):
            self._gates.prefetch(version)
        self._adapters.prefetch(*adapters, claimed=claimed_adapters)

    def pages(self, version: str) -> PageList:
        """The pages of an acquired adapter."""
        return self._adapters.pages(version)

    def gates(self, version: str) -> GateTable:
        """The gates of an acquired gate set."""
        return self._gates.table(version)

    def poll(self) -> ResidencyEvents:
        """What happened since the last poll."""
        adapters, gates = self._adapters.poll(), self._gates.poll()
        return ResidencyEvents(
            (*adapters.moved, *gates.moved), {**adapters.failed, **gates.failed}, adapters.passing | gates.passing
        )

    @property
    def retry_in_s(self) -> float | None:
        """After how long a poll has something to try, though nothing loads."""
        return soonest(self._adapters.retry_in_s, self._gates.retry_in_s)

    def stats(self) -> ResidencyStats:
        """Counts for the metrics."""
        return self._adapters.stats()

    def residents(self) -> Iterator[Resident]:
        """All adapters and gate sets, as they are now."""
        yield from self._adapters.residents()
        yield from self._gates.residents()

    def close(self) -> None:
        """End the loader threads."""
        self._adapters.close()
        self._gates.close()

    def _of(self, version: str) -> Residency | GateResidency:
        return self._gates if self._gates.knows(version) else self._adapters

    def _sorted(self, versions: Sequence[str]) -> tuple[list[str], list[str]]:
        gate_sets = [version for version in versions if self._gates.knows(version)]
        return gate_sets, [version for version in versions if not self._gates.knows(version)]


_WORST_FIRST: list[Admission] = ["failed", "no_room", "loading", "ready"]

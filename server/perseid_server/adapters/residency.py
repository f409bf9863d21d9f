"""Where adapters are: on disk, in host memory, on the device. Least recently used goes first; in use never goes.

All of this happens on the engine's thread, which asks and decides; the work is the loader's (`loader.py`).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from perseid_kernels.segments import PageList
from perseid_server.adapters.demand import Demand, Need
from perseid_server.adapters.device_tier import DeviceTier
from perseid_server.adapters.host_tier import HostTier
from perseid_server.adapters.loader import Done, Loader, Read, Write
from perseid_server.adapters.pins import Pins
from perseid_server.adapters.pool import AdapterPool
from perseid_server.adapters.reading import Reading
from perseid_server.adapters.state import Admission, Happened, Location, ResidencyEvents, ResidencyStats, Resident
from perseid_server.adapters.tracked import Tracked
from perseid_server.model.spec import BaseSpec


class Residency:
    """Implements `engine.ports.Residency` over a pool."""

    def __init__(
        self, spec: BaseSpec, pool: AdapterPool, host_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`clock`: what pinned versions that failed to load wait on, s."""
        self._clock = clock
        self._pool = pool
        self._loader = Loader(spec, pool)
        self._demand = Demand()
        self._host = HostTier(host_bytes, lambda version: self._demand.need(self._adapters[version]))
        self._reading = Reading(self._loader, self._host, self._demand)
        self._device = DeviceTier(pool)
        self._adapters: dict[str, Tracked] = {}
        self._pins = Pins()
        self._events = Happened()
        self._lookups = 0
        self._hits = 0

    # --- names --------------------------------------------------------------------------------------------------

    def register(self, version: str, path: str) -> None:
        """Make a version known. Registering it again revives one that was to be forgotten."""
        adapter = self._adapters.setdefault(version, Tracked(version, Path(path)))
        adapter.path = Path(path)
        adapter.forgotten = False
        adapter.forget_failures()
        adapter.read_again = adapter.reading

    def forget(self, version: str) -> None:
        """Let a version go with its last user."""
        adapter = self._adapters[version]
        adapter.forgotten = True
        self._pins.remove(adapter)
        self._drop_if_forgotten(adapter)

    def pin(self, version: str, pinned: bool) -> None:
        """Bring a version to the device and keep it there, or let it be evicted again."""
        adapter = self._adapters[version]
        if adapter.forgotten:  # and in use still
            return
        if pinned:
            self._pins.add(adapter)
            self._advance(adapter)
        else:
            self._pins.remove(adapter)

    def knows(self, version: str) -> bool:
        """Whether the version is registered (and not forgotten and gone)."""
        return version in self._adapters

    def folder(self, version: str) -> Path | None:
        """Where the version's files are; None when it is not registered."""
        adapter = self._adapters.get(version)
        return adapter.path if adapter is not None else None

    def is_pinned(self, version: str) -> bool:
        """Whether the version is pinned."""
        return self._adapters[version].pinned

    def location(self, version: str) -> Location:
        """Where the version is now."""
        adapter = self._adapters[version]
        if adapter.on_device:
            return "device"
        return "host" if self._host.get(version) is not None else "disk"

    def error(self, version: str) -> str | None:
        """Why the version cannot be loaded, or could not when that was last tried."""
        adapter = self._adapters[version]
        return adapter.error or adapter.trouble

    def problem(self, *versions: str) -> str | None:
        """Why these versions cannot be on the device together, beside what is pinned now."""
        adapters = [self._adapters[version] for version in versions]
        error = next((adapter.error for adapter in adapters if adapter.error is not None), None)
        if error is not None or all(adapter.on_device for adapter in adapters):
            return error
        return self._device.why_never(adapters, list(self._pins))

    @property
    def is_loading(self) -> bool:
        """Whether the loader has work whose end a poll will take over."""
        return self._loader.num_jobs > 0

    def pages(self, version: str) -> PageList:
        """The pages of a version on the device."""
        pages = self._adapters[version].pages
        assert pages is not None, "acquired versions are on the device"
        return PageList.of(pages)

    def stats(self) -> ResidencyStats:
        """Counts for the metrics."""
        used = self._pool.num_pages - self._pool.num_free
        return ResidencyStats(used, self._pool.num_pages, self._lookups, self._hits)

    def residents(self) -> Iterator[Resident]:
        """All that are known, as they are now."""
        for version, one in self._adapters.items():
            yield Resident(
                version,
                "adapter",
                self.location(version),
                len(one.pages or ()),
                one.users,
                one.pinned,
                is_loading=one.reading or one.writing,
                error=self.error(version),
            )

    # --- use ----------------------------------------------------------------------------------------------------

    def acquire(self, *versions: str, evict_wanted: bool = True) -> Admission:
        """Take a reference to each version if all are on the device; otherwise see that they come there.

        `evict_wanted`: also in place of versions that came for a request and wait for it. Only the oldest waiting
        request may do that; so it gets all it needs in the end, however many that are.
        """
        if self.problem(*versions) is not None:
            return "failed"
        adapters = [self._adapters[version] for version in versions]
        missing = [adapter for adapter in adapters if not adapter.on_device]
        first_ask = not any(adapter.wanted for adapter in adapters)
        for adapter in adapters:
            adapter.wanted = bool(missing)
        if missing:
            if evict_wanted:
                self._demand.claimed = frozenset(versions)
            # all are asked for, so that they are read meanwhile, whether there is room for the first or not
            advanced = [self._advance(each, spare_wanted=not evict_wanted, spared=versions) for each in missing]
            if self.problem(*versions) is not None:
                return "failed"
            return "loading" if all(advanced) else "no_room"
        for adapter in adapters:
            adapter.users += 1
            self._device.used(adapter)
        self._lookups += len(adapters)
        self._hits += len(adapters) if first_ask else 0
        return "ready"

    def has_room(self, *versions: str, without: Sequence[str]) -> bool:
        """Whether there were pages for all these if nobody used those in `without`, as far as their sizes are known."""
        return self._device.has_room([self._adapters[version] for version in versions], without)

    def release(self, *versions: str) -> None:
        """Give references back."""
        for version in versions:
            adapter = self._adapters[version]
            assert adapter.users > 0, "released more often than acquired"
            adapter.users -= 1
            self._pins.is_due = True
            self._drop_if_forgotten(adapter)

    def claim(self, *versions: str) -> None:
        """It is the turn of who needs these: bring them to the host before all others."""
        self._demand.claimed = frozenset(versions)
        self._reading.start_in_order(self._adapters.get(version) for version in versions)

    def prefetch(self, *versions: str, claimed: Sequence[str] = ()) -> None:
        """What those who wait need, the next first, and whoever has the claim: bring as much to the host as it holds,
        so that only the copy to the device is left when its turn comes. What was said before holds no more."""
        if self._demand.changes(versions, claimed):
            self._pins.is_due = True
            if not versions:  # nobody waits: what comes now takes no room, and what has come keeps none from others
                for adapter in self._adapters.values():
                    adapter.wanted = adapter.wanted and adapter.pinned
        self._reading.start_in_order(self._adapters.get(version) for version in (*claimed, *versions))

    def poll(self) -> ResidencyEvents:
        """Take over what the loader has done, and report what happened since the last poll."""
        for done in self._loader.done():
            self._take_over(done)
        for adapter in self._pins.to_try(self._clock()):
            if self._device.has_room([adapter], ()):  # no use in reading it before
                self._advance(adapter, spare_wanted=True)
        happened, self._events = self._events, Happened()
        return happened.told()

    @property
    def retry_in_s(self) -> float | None:
        """After how long a poll has something to try for a pin, though the loader is idle. None: not of itself."""
        return self._pins.retry_in_s(self._clock())

    def close(self) -> None:
        """End the loader thread."""
        self._loader.close()

    # --- from tier to tier --------------------------------------------------------------------------------------

    def _advance(self, adapter: Tracked, *, spare_wanted: bool = False, spared: Sequence[str] = ()) -> bool:
        """Take the next step towards the device; False when there is no room because everything is in use.

        `spare_wanted`: nobody asks just now, so nothing is evicted that came for a request and waits to be acquired.
        Otherwise two requests could take the same room from each other for ever. `spared`: what belongs together.
        """
        if adapter.on_device or adapter.writing or adapter.error is not None:
            return True
        host = self._host.get(adapter.version)
        if host is None:
            if self._demand.need(adapter) >= Need.PIN:  # for others that is done in the order of their turn
                self._reading.start(adapter)
            return True
        num_pages = host.info.num_pages
        if num_pages > self._pool.num_pages:
            self._fail(
                adapter,
                f"it needs {num_pages} pages of adapter memory and there are {self._pool.num_pages}; "
                "raise --adapter-memory",
            )
            return True
        gone = self._device.make_room(num_pages, spare_wanted=spare_wanted, spared=spared)
        if gone is None:
            return False
        self._events.moved.update(each.version for each in gone)
        pages = self._pool.allocate(num_pages)
        assert pages is not None, "make_room() said there is room"
        adapter.pages = pages
        adapter.writing = True
        self._host.used(adapter.version)
        self._loader.hand_over(Write(adapter.version, pages, host))
        return True

    def _take_over(self, done: Done) -> None:
        adapter = self._adapters[done.job.version]
        if isinstance(done.job, Read):
            adapter.reading = False
            if done.host is None:
                self._host.comes_not(adapter.version)
                self._read_failed(adapter, done.error or "", is_final=done.is_final)
            else:
                adapter.num_pages = done.host.info.num_pages
                self._host.add(adapter.version, done.host)
                if adapter.wanted and not adapter.forgotten and self._may_pass(adapter):
                    self._advance(adapter, spare_wanted=True)
                self._events.moved.update((adapter.version, *self._host.make_room(adapter.version)))
        else:
            adapter.writing = False
            if done.error is not None:
                self._pool.free(done.job.pages)
                adapter.pages = None
                self._fail(adapter, done.error, is_final=done.is_final)
            else:
                self._device.arrived(adapter)
                adapter.forget_failures()
                self._events.moved.add(adapter.version)
        self._drop_if_forgotten(adapter)

    def _may_pass(self, adapter: Tracked) -> bool:
        """Whether one that has come may take room on the device though nobody asks just now. Not before a claim that
        waits for room with all it needs next at hand."""
        ready = [self._adapters[version] for version in self._demand.claimed if self._host.get(version) is not None]
        return self._demand.need(adapter) >= Need.PIN or all(each.on_device or each.writing for each in ready)

    def _read_failed(self, adapter: Tracked, error: str, *, is_final: bool) -> None:
        """The files of a version that is forgotten are deleted, also under the loader's hands: that is no failure."""
        if adapter.read_again:
            self._reading.start(adapter)
        elif not adapter.forgotten:
            self._fail(adapter, error, is_final=is_final)

    def _fail(self, adapter: Tracked, error: str, *, is_final: bool = True) -> None:
        """Those who wait are told. Unless the error is final, the next request for it tries again, or its pin does."""
        adapter.load_failed(error, self._clock(), is_final=is_final)
        self._events.failed[adapter.version] = error
        if not is_final:
            self._events.passing.add(adapter.version)

    def _drop_if_forgotten(self, adapter: Tracked) -> None:
        if not adapter.forgotten or adapter.users or adapter.reading or adapter.writing:
            return
        if adapter.on_device:
            self._device.leave(adapter)
            self._events.moved.add(adapter.version)
        if self._host.forget(adapter.version):
            self._events.moved.add(adapter.version)
        del self._adapters[adapter.version]

"""Names of adapters, gate sets and Medusa heads, the versions they stand for, and who uses which.

A request leases the version a name stands for when it begins, and ends on it. A version that no name stands for and
nobody leases is forgotten by the engine and deleted from the store. Heads are leased by nobody: no answer depends on
them, so those that lose their name end their drafts, also for requests that run.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from perseid_server.adapters.intake import Arrival, Intake
from perseid_server.adapters.names import check_name
from perseid_server.adapters.source import SourcePolicy
from perseid_server.adapters.store import AdapterStore, Naming
from perseid_server.engine.messages import AdapterState
from perseid_server.errors import (
    AdapterRejected,
    Conflict,
    InvalidRequest,
    NotFound,
    PerseidError,
    Unavailable,
)
from perseid_server.frontend.background import Background, on_disk
from perseid_server.frontend.draining import Draining
from perseid_server.frontend.fetching import Fetching
from perseid_server.frontend.leases import Leases
from perseid_server.frontend.loaded import (
    EngineAdapters,
    Loaded,
    LoadedAdapter,
    forget,
    loaded_from,
    pin,
    register,
    what,
)
from perseid_server.frontend.loaded_names import LoadedNames
from perseid_server.frontend.may_load import policy_for_caller, refuse_unseen
from perseid_server.model.spec import BaseSpec
from perseid_server.observe.record import current_call
from perseid_server.speculation.heads_file import HeadsInfo

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Options:
    """How something is to be loaded."""

    source: str
    replace: bool
    pin: bool
    adapter: str | None  # whom heads are for
    policy: SourcePolicy


class AdapterRegistry(LoadedNames):
    """All methods run on one event loop; work on the disk happens in threads.

    A change that has begun is made whole though its caller leaves: a thread cannot be stopped, and what it has written
    must not differ from what is served.
    """

    def __init__(
        self,
        store: AdapterStore,
        engine: EngineAdapters,
        base: BaseSpec,
        policy: SourcePolicy,
        num_pages: int | None = None,
        *,
        allow_pickle_heads: bool = False,
    ) -> None:
        """`num_pages`: adapter memory on the device; what can never fit is refused. None: as much as needed.
        `allow_pickle_heads`: read Medusa v1's pickles."""
        super().__init__()
        self._store = store
        self._engine = engine
        self._base = base
        self._policy = policy
        self._fetching = Fetching(store)
        self._intake = Intake(store, base, num_pages, allow_pickle_heads=allow_pickle_heads)
        self._versions: dict[str, Loaded] = {}  # all that the engine knows: named, or leased still
        self._background = Background()
        self._writing = asyncio.Lock()  # one change of names at a time
        self.draining = Draining()
        self._on_load: list[Callable[[str, float], None]] = []
        self._on_change: list[Callable[[], None]] = []
        self.leases = Leases(self._freed)
        self.num_pages = num_pages

    @property
    def reserved_names(self) -> frozenset[str]:
        """Names an adapter cannot have."""
        return frozenset({self._base.name})

    @property
    def base_name(self) -> str:
        """What the base is called."""
        return self._base.name

    async def restore(self) -> None:
        """Serve what the store holds. What does not fit this base stays in the store, unserved."""
        for entry in self._store.entries().values():
            try:
                content = await asyncio.to_thread(self._intake.check, self._store.folder(entry.version), entry.kind)
            except AdapterRejected as error:
                logger.warning("%r of the store is not served with this base: %s", entry.name, error.message)
                continue
            self._serve(loaded_from(entry, content))

    async def load(
        self,
        name: str,
        source: str,
        *,
        replace: bool = False,
        pin: bool = False,
        adapter: str | None = None,
        policy: SourcePolicy | None = None,
    ) -> Loaded:
        """Check an adapter, a gate set or heads, store it, serve it. Everything stays as it was when this raises a
        PerseidError. A MeteoRA checkpoint brings its adapters too, as `name.<their names>`.

        `adapter`: name of the adapter that heads are for; None: as their file says, else the base.
        """
        self.draining.check()
        call = current_call()
        call.subject = name
        check_name(name, taken=self.reserved_names)
        refuse_unseen(name)
        if not replace:
            self._refuse_taken(name)
        if adapter is not None:
            self._check_adapter(adapter)
        options = _Options(source, replace, pin, adapter, policy or policy_for_caller(self._policy))
        started = time.perf_counter()
        try:
            loaded = await self._background.whole(self._load(name, options))
        except PerseidError:
            self._load_ended("refused", started)
            raise
        self._load_ended("loaded", started)
        call.version = loaded.version
        return loaded

    async def unload(self, name: str) -> None:
        """Take a name away. NotFound when there is none."""
        self.draining.check()
        current_call().subject = name
        await self._background.whole(self._unload(name))

    async def pin(self, name: str, *, pinned: bool) -> Loaded:
        """Keep an adapter or a gate set on the device, or let it go. Heads are always there."""
        self.draining.check()
        current_call().subject = name
        return await self._background.whole(self._pin(name, pinned))

    async def drain(self, grace_s: float) -> None:
        """Take no more changes; return when those that have begun are made, or the grace time is over."""
        self.draining.begin()
        if self._background.tasks:
            await asyncio.wait(self._background.tasks, timeout=grace_s)

    def close(self) -> None:
        """Begin no more downloads."""
        self._fetching.close()

    def on_load(self, callback: Callable[[str, float], None]) -> None:
        """Be told how every load ended, "loaded" or "refused", and after how many seconds."""
        self._on_load.append(callback)

    def on_change(self, callback: Callable[[], None]) -> None:
        """Be told when names have changed, before versions that lost theirs are forgotten."""
        self._on_change.append(callback)

    def state(self, loaded: Loaded) -> AdapterState | None:
        """Where the engine has it; None as long as it was never needed."""
        return self._engine.adapter_states.get(loaded.version)

    def locations(self) -> Counter[str]:
        """How many adapters are on disk, in host memory, on the device."""
        states = (self.state(adapter) for adapter in self.everyones_adapters())
        return Counter(state.location if state else "disk" for state in states)

    def folder(self, loaded: Loaded) -> str:
        """Where its files lie in the store."""
        return str(self._store.folder(loaded.version))

    @contextmanager
    def lease(self, name: str) -> Iterator[LoadedAdapter]:
        """Hold the version that an adapter's name stands for now."""
        loaded = self.adapter(name)
        with self.leases.hold(loaded.version):
            yield loaded

    # --- changes ------------------------------------------------------------------------------------------------

    async def _load(self, name: str, options: _Options) -> Loaded:
        async with self._fetching.files(options.source, options.policy) as folder:
            arrivals = await on_disk(self._intake.take, name, folder)
        try:
            _refuse_adapter_of_others(arrivals[-1], options)
            refuse_unseen(*(arrival.name for arrival in arrivals))
            async with self._writing:
                if not options.replace:
                    self._refuse_taken(*(arrival.name for arrival in arrivals))
                await self._name(arrivals, options)
        except BaseException:
            await asyncio.to_thread(self._intake.discard, arrivals)
            raise
        return self._loaded[name]

    async def _name(self, arrivals: tuple[Arrival, ...], options: _Options) -> None:
        """Serve what has arrived, all of it under its names; let go of what had them before."""
        before = [self._loaded[arrival.name] for arrival in arrivals if arrival.name in self._loaded]
        namings = [
            Naming(arrival.name, arrival.staged, options.source, options.pin, options.adapter) for arrival in arrivals
        ]
        entries = await on_disk(self._store.commit, namings)
        for entry, arrival in zip(entries, arrivals, strict=True):
            self._serve(loaded_from(entry, arrival.content))
        self._changed()
        for loaded in before:
            await self._retire(loaded.version)

    async def _unload(self, name: str) -> None:
        async with self._writing:
            loaded = self.get(name)
            await on_disk(self._store.remove, name)
            del self._loaded[name]
            self._changed()
            await self._retire(loaded.version)

    async def _pin(self, name: str, pinned: bool) -> Loaded:
        async with self._writing:
            entry = await on_disk(self._store.pin, self.get(name).name, pinned=pinned)
            self._loaded[name] = replace(self._loaded[name], entry=entry)
            self._tell_pin(entry.version)
            return self._loaded[name]

    def _load_ended(self, outcome: str, started: float) -> None:
        for callback in self._on_load:
            callback(outcome, time.perf_counter() - started)

    def _refuse_taken(self, *names: str) -> None:
        for name in names:
            if name in self._loaded:
                raise Conflict(
                    f"{what(self._loaded[name])} {name!r} is loaded already; unload it first, or ask to replace it",
                    field="name",
                )

    def _check_adapter(self, name: str) -> None:
        """Heads for an adapter that is misspelt would never draft."""
        try:
            self.adapter(name)
        except (NotFound, InvalidRequest) as error:
            raise type(error)(f"adapter: {error.message}", field="adapter") from error

    def _serve(self, loaded: Loaded) -> None:
        self._loaded[loaded.name] = self._versions[loaded.version] = loaded
        register(self._engine, loaded, self.folder(loaded), pinned=self._is_pinned(loaded.version))

    def _changed(self) -> None:
        for callback in self._on_change:
            callback()

    # --- letting go ---------------------------------------------------------------------------------------------

    def _is_named(self, version: str) -> bool:
        return any(loaded.version == version for loaded in self._loaded.values())

    def _is_pinned(self, version: str) -> bool:
        return any(loaded.version == version and loaded.entry.pinned for loaded in self._loaded.values())

    def _tell_pin(self, version: str) -> None:
        loaded = self._versions[version]
        pin(self._engine, loaded, self.folder(loaded), pinned=self._is_pinned(version))

    def _freed(self, version: str) -> None:
        """The last request that used a version has ended."""
        if not self._is_named(version):
            self._background.start(self._retire_later(version))

    async def _retire(self, version: str) -> None:
        """Let go of a version unless a name or a lease still holds it; of its pin, unless a name still pins it."""
        if self._is_named(version) or version in self.leases:
            self._tell_pin(version)
            return
        loaded = self._versions.pop(version, None)
        if loaded is None:  # let go of already
            return
        forget(self._engine, loaded)
        with contextlib.suppress(Unavailable):  # what cannot be deleted now is deleted at the next change
            await on_disk(
                self._store.collect, self.leases.versions() | {held.version for held in self._loaded.values()}
            )

    async def _retire_later(self, version: str) -> None:
        async with self._writing:
            await self._retire(version)


def _refuse_adapter_of_others(arrival: Arrival, options: _Options) -> None:
    if options.adapter is not None and not isinstance(arrival.content, HeadsInfo):
        raise InvalidRequest(
            f"adapter: only Medusa heads are for an adapter, and {options.source!r} holds none; leave it out",
            field="adapter",
        )

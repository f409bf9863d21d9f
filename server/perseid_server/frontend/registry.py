"""Adapter names, the versions they stand for, and who uses which.

A request leases the version its adapter's name stands for when it begins, and ends on it. A version that no name
stands for and nobody leases is forgotten by the engine and deleted from the store.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

from perseid_server.adapters.lora import AdapterInfo, CheckedAdapter, check_adapter
from perseid_server.adapters.names import MAX_LENGTH, check_name
from perseid_server.adapters.source import SourcePolicy, resolve_adapter
from perseid_server.adapters.store import AdapterStore, Entry, Staged
from perseid_server.engine.messages import AdapterState
from perseid_server.errors import AdapterRejected, Conflict, NotFound, PerseidError, Unavailable
from perseid_server.model.spec import BaseSpec

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


class EngineAdapters(Protocol):
    """What the registry tells the engine."""

    adapter_states: dict[str, AdapterState]

    def register_adapter(self, version: str, path: str, *, pinned: bool = False) -> None: ...

    def pin_adapter(self, version: str, *, pinned: bool) -> None: ...

    def forget_adapter(self, version: str) -> None: ...


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter that can be named in a request."""

    entry: Entry
    info: AdapterInfo

    @property
    def name(self) -> str:
        """The name."""
        return self.entry.name

    @property
    def version(self) -> str:
        """Content hash."""
        return self.entry.version


class AdapterRegistry:
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
    ) -> None:
        """`num_pages`: adapter memory on the device; what can never fit is refused. None: as much as needed."""
        self._store = store
        self._engine = engine
        self._base = base
        self._policy = policy
        self._num_pages = num_pages
        self._loaded: dict[str, LoadedAdapter] = {}
        self._leases: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._writing = asyncio.Lock()  # one change of names at a time
        self._on_load: list[Callable[[str], None]] = []

    @property
    def reserved_names(self) -> frozenset[str]:
        """Names an adapter cannot have."""
        return frozenset({self._base.name})

    async def restore(self) -> None:
        """Serve what the store holds. What does not fit this base stays in the store, unserved."""
        for entry in self._store.entries().values():
            try:
                checked = await asyncio.to_thread(self._check, self._store.folder(entry.version))
            except AdapterRejected as error:
                logger.warning("adapter %r of the store is not served with this base: %s", entry.name, error.message)
                continue
            self._serve(LoadedAdapter(entry, checked.info))

    async def load(
        self, name: str, source: str, *, replace: bool = False, pin: bool = False, policy: SourcePolicy | None = None
    ) -> LoadedAdapter:
        """Check an adapter, store it, serve it. Everything stays as it was when this raises a PerseidError."""
        check_name(name, taken=self.reserved_names)
        if not replace:
            self._refuse_taken(name)
        try:
            loaded = await self._whole(self._load(name, source, replace, pin, policy or self._policy))
        except PerseidError:
            self._load_ended("refused")
            raise
        self._load_ended("loaded")
        return loaded

    async def unload(self, name: str) -> None:
        """Take a name away. NotFound when there is none."""
        await self._whole(self._unload(name))

    async def pin(self, name: str, *, pinned: bool) -> LoadedAdapter:
        """Keep an adapter on the device, or let it go."""
        return await self._whole(self._pin(name, pinned))

    def on_load(self, callback: Callable[[str], None]) -> None:
        """Be told how every load ended: "loaded" or "refused"."""
        self._on_load.append(callback)

    def get(self, name: str) -> LoadedAdapter:
        """NotFound when there is none of that name."""
        loaded = self._loaded.get(name)
        if loaded is None:
            raise NotFound(f"no adapter {name[:MAX_LENGTH]!r} is loaded", field="name")
        return loaded

    def find(self, name: str) -> LoadedAdapter | None:
        """As `get`, None when there is none."""
        return self._loaded.get(name)

    def list(self) -> tuple[LoadedAdapter, ...]:
        """All adapters in the order they were loaded."""
        return tuple(self._loaded.values())

    def names(self) -> Mapping[str, str]:
        """version → a name it has, for metrics."""
        return {loaded.version: name for name, loaded in self._loaded.items()}

    def state(self, loaded: LoadedAdapter) -> AdapterState | None:
        """Where the engine has it; None as long as it was never needed."""
        return self._engine.adapter_states.get(loaded.version)

    def locations(self) -> Counter[str]:
        """How many adapters are on disk, in host memory, on the device."""
        states = [self.state(adapter) for adapter in self.list()]
        return Counter(state.location if state else "disk" for state in states)

    @contextmanager
    def lease(self, name: str) -> Iterator[LoadedAdapter]:
        """Hold the version that a name stands for now."""
        loaded = self.get(name)
        self._leases[loaded.version] += 1
        try:
            yield loaded
        finally:
            self._leases[loaded.version] -= 1
            if not self._leases[loaded.version]:
                del self._leases[loaded.version]
                if not self._is_named(loaded.version):
                    self._background(self._retire_later(loaded.version))

    # --- changes ------------------------------------------------------------------------------------------------

    async def _load(self, name: str, source: str, replace: bool, pin: bool, policy: SourcePolicy) -> LoadedAdapter:
        folder = await asyncio.to_thread(resolve_adapter, source, policy)
        staged: Staged = await self._on_disk(self._store.stage, folder)
        try:
            checked = await asyncio.to_thread(self._check, staged.folder)
            async with self._writing:
                if not replace:
                    self._refuse_taken(name)
                before = self._loaded.get(name)
                entry = await self._on_disk(self._store.commit, staged, name, source, pinned=pin)
                loaded = LoadedAdapter(entry, checked.info)
                self._serve(loaded)
                if before is not None:
                    await self._retire(before.version)
        except BaseException:
            await asyncio.to_thread(self._store.discard, staged)
            raise
        return loaded

    async def _unload(self, name: str) -> None:
        async with self._writing:
            loaded = self.get(name)
            await self._on_disk(self._store.remove, name)
            del self._loaded[name]
            await self._retire(loaded.version)

    async def _pin(self, name: str, pinned: bool) -> LoadedAdapter:
        async with self._writing:
            loaded = self.get(name)
            entry = await self._on_disk(self._store.pin, name, pinned=pinned)
            self._loaded[name] = LoadedAdapter(entry, loaded.info)
            self._engine.pin_adapter(entry.version, pinned=self._is_pinned(entry.version))
            return self._loaded[name]

    async def _whole(self, change: Coroutine[Any, Any, R]) -> R:
        """What a change brings. It goes on when the caller is cancelled."""
        task = self._background(change)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_ended_unheard)
            raise

    def _check(self, folder: Path) -> CheckedAdapter:
        checked = check_adapter(folder, self._base)
        needed = checked.info.num_pages
        if self._num_pages is not None and needed > self._num_pages:
            raise AdapterRejected(
                f"rank {checked.info.rank} needs {needed} pages of adapter memory, the server has {self._num_pages}; "
                "raise --adapter-memory"
            )
        return checked

    def _load_ended(self, outcome: str) -> None:
        for callback in self._on_load:
            callback(outcome)

    def _refuse_taken(self, name: str) -> None:
        if name in self._loaded:
            raise Conflict(
                f"an adapter {name!r} is loaded already; unload it first, or ask to replace it", field="name"
            )

    def _serve(self, loaded: LoadedAdapter) -> None:
        self._loaded[loaded.name] = loaded
        path = str(self._store.folder(loaded.version))
        self._engine.register_adapter(loaded.version, path, pinned=self._is_pinned(loaded.version))

    # --- letting go ---------------------------------------------------------------------------------------------

    def _is_named(self, version: str) -> bool:
        return any(loaded.version == version for loaded in self._loaded.values())

    def _is_pinned(self, version: str) -> bool:
        return any(loaded.version == version and loaded.entry.pinned for loaded in self._loaded.values())

    async def _retire(self, version: str) -> None:
        """Let go of a version unless a name or a lease still holds it; of its pin, unless a name still pins it."""
        if self._is_named(version) or self._leases[version]:
            self._engine.pin_adapter(version, pinned=self._is_pinned(version))
            return
        self._engine.forget_adapter(version)
        with contextlib.suppress(Unavailable):  # what cannot be deleted now is deleted at the next change
            await self._on_disk(self._store.collect, set(self._leases) | {held.version for held in self.list()})

    async def _retire_later(self, version: str) -> None:
        async with self._writing:
            await self._retire(version)

    def _background(self, work: Coroutine[Any, Any, R]) -> asyncio.Task[R]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    @staticmethod
    async def _on_disk(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run blocking work on the store in a thread; a full or broken disk is the operator's business."""
        try:
            return await asyncio.to_thread(function, *args, **kwargs)
        except OSError as error:
            logger.exception("the adapter store failed")
            raise Unavailable(f"the adapter store failed: {error.strerror or 'input/output error'}") from error


def _ended_unheard(change: asyncio.Task[Any]) -> None:
    """Nobody waits for this change any more. A refusal is no news then; a bug is logged."""
    error = None if change.cancelled() else change.exception()
    if error is not None and not isinstance(error, PerseidError):
        logger.error("a change of the adapters failed", exc_info=error)

"""What a name stands for: an adapter, a gate set, or Medusa heads."""

from dataclasses import dataclass
from typing import Protocol

from perseid_router.gate_set import GateSetConfig
from perseid_router.request_router import RequestRouter
from perseid_server.adapters.gate_set_file import GateSetInfo
from perseid_server.adapters.intake import Content, GateSetContent
from perseid_server.adapters.lora import AdapterInfo
from perseid_server.adapters.manifest import Entry
from perseid_server.engine.messages import AdapterState
from perseid_server.speculation.heads_file import HeadsInfo


@dataclass(frozen=True, slots=True)
class _Named:
    """What the store has under a name."""

    entry: Entry

    @property
    def name(self) -> str:
        """The name."""
        return self.entry.name

    @property
    def version(self) -> str:
        """Content hash."""
        return self.entry.version


@dataclass(frozen=True, slots=True)
class LoadedAdapter(_Named):
    """An adapter that can be named in a request."""

    info: AdapterInfo


@dataclass(frozen=True, slots=True)
class LoadedGateSet(_Named):
    """Gates that `auto` can be served by. Adapters it names may be loaded or not."""

    config: GateSetConfig
    info: GateSetInfo
    router: RequestRouter | None = None  # chooses once for a whole request


@dataclass(frozen=True, slots=True)
class LoadedHeads(_Named):
    """Medusa heads that draft for the base, or for one adapter, which may be loaded or not."""

    info: HeadsInfo

    @property
    def is_for_base(self) -> bool:
        """Whether no adapter is named, neither when they were loaded nor in their file."""
        return self.entry.adapter is None and self.info.adapter is None


Loaded = LoadedAdapter | LoadedGateSet | LoadedHeads


def what(loaded: Loaded) -> str:
    """What it is, for messages."""
    match loaded:
        case LoadedAdapter():
            return "an adapter"
        case LoadedGateSet():
            return "a gate set"
        case LoadedHeads():
            return "a set of Medusa heads"


class EngineAdapters(Protocol):
    """What the engine is told about adapters, gate sets and heads."""

    adapter_states: dict[str, AdapterState]

    def register_adapter(self, version: str, path: str, *, pinned: bool = False) -> None: ...

    def pin_adapter(self, version: str, *, pinned: bool) -> None: ...

    def forget_adapter(self, version: str) -> None: ...

    def register_gate_set(
        self, version: str, path: str | None, adapters: tuple[str, ...], *, null: bool, pinned: bool = False
    ) -> None: ...

    def forget_gate_set(self, version: str) -> None: ...

    def register_heads(self, version: str, path: str) -> None: ...

    def forget_heads(self, version: str) -> None: ...


def loaded_from(entry: Entry, content: Content) -> Loaded:
    """What has been checked and has a name."""
    if isinstance(content, GateSetContent):
        return LoadedGateSet(entry, content.config, content.info, content.router)
    if isinstance(content, HeadsInfo):
        return LoadedHeads(entry, content)
    return LoadedAdapter(entry, content)


def register(engine: EngineAdapters, loaded: Loaded, path: str, *, pinned: bool) -> None:
    """Make a version known to the engine, or change its pin."""
    match loaded:
        case LoadedAdapter():
            engine.register_adapter(loaded.version, path, pinned=pinned)
        case LoadedGateSet(config=config):
            columns = tuple(column.version for column in config.adapters)
            engine.register_gate_set(loaded.version, path, columns, null=config.null, pinned=pinned)
        case LoadedHeads():
            engine.register_heads(loaded.version, path)


def pin(engine: EngineAdapters, loaded: Loaded, path: str, *, pinned: bool) -> None:
    """Keep a version on the device, or let it go. Heads stay there in any case."""
    match loaded:
        case LoadedAdapter():
            engine.pin_adapter(loaded.version, pinned=pinned)
        case LoadedGateSet():
            register(engine, loaded, path, pinned=pinned)  # changes nothing but the pin
        case LoadedHeads():
            pass


def forget(engine: EngineAdapters, loaded: Loaded) -> None:
    """No new request names this version."""
    match loaded:
        case LoadedAdapter():
            engine.forget_adapter(loaded.version)
        case LoadedGateSet():
            engine.forget_gate_set(loaded.version)
        case LoadedHeads():
            engine.forget_heads(loaded.version)

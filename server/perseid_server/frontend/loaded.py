"""What a name stands for: an adapter, or a gate set."""

from dataclasses import dataclass
from typing import Protocol

from perseid_router.gate_set import GateSetConfig
from perseid_router.request_router import RequestRouter
from perseid_server.adapters.gate_set_file import GateSetInfo
from perseid_server.adapters.intake import Content, GateSetContent
from perseid_server.adapters.lora import AdapterInfo
from perseid_server.adapters.manifest import Entry
from perseid_server.engine.messages import AdapterState


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


@dataclass(frozen=True, slots=True)
class LoadedGateSet:
    """Gates that `auto` can be served by. Adapters it names may be loaded or not."""

    entry: Entry
    config: GateSetConfig
    info: GateSetInfo
    router: RequestRouter | None = None  # chooses once for a whole request

    @property
    def name(self) -> str:
        """The name."""
        return self.entry.name

    @property
    def version(self) -> str:
        """Content hash."""
        return self.entry.version


Loaded = LoadedAdapter | LoadedGateSet


class EngineAdapters(Protocol):
    """What the engine is told about adapters and gate sets."""

    adapter_states: dict[str, AdapterState]

    def register_adapter(self, version: str, path: str, *, pinned: bool = False) -> None: ...

    def pin_adapter(self, version: str, *, pinned: bool) -> None: ...

    def forget_adapter(self, version: str) -> None: ...

    def register_gate_set(
        self, version: str, path: str | None, adapters: tuple[str, ...], *, null: bool, pinned: bool = False
    ) -> None: ...

    def forget_gate_set(self, version: str) -> None: ...


def loaded_from(entry: Entry, content: Content) -> Loaded:
    """What has been checked and has a name."""
    if isinstance(content, GateSetContent):
        return LoadedGateSet(entry, content.config, content.info, content.router)
    return LoadedAdapter(entry, content)


def register(engine: EngineAdapters, loaded: Loaded, path: str, *, pinned: bool) -> None:
    """Make a version known to the engine, or change its pin."""
    match loaded:
        case LoadedAdapter():
            engine.register_adapter(loaded.version, path, pinned=pinned)
        case LoadedGateSet(config=config):
            columns = tuple(column.version for column in config.adapters)
            engine.register_gate_set(loaded.version, path, columns, null=config.null, pinned=pinned)


def pin(engine: EngineAdapters, loaded: Loaded, path: str, *, pinned: bool) -> None:
    """Keep a version on the device, or let it go."""
    if isinstance(loaded, LoadedAdapter):
        engine.pin_adapter(loaded.version, pinned=pinned)
    else:
        register(engine, loaded, path, pinned=pinned)  # changes nothing but the pin


def forget(engine: EngineAdapters, loaded: Loaded) -> None:
    """No new request names this version."""
    if isinstance(loaded, LoadedAdapter):
        engine.forget_adapter(loaded.version)
    else:
        engine.forget_gate_set(loaded.version)

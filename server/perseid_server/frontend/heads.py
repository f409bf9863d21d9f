"""Which Medusa heads draft for a request, and whom heads are for."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from perseid_server.access.caller import current_caller
from perseid_server.engine.adaptation import Adaptation
from perseid_server.engine.messages import AdapterState
from perseid_server.frontend.loaded import LoadedAdapter, LoadedHeads
from perseid_server.frontend.loaded_names import LoadedNames


class HeadsChooser:
    """Chooses by what adapts the base; of several that fit, the heads that were loaded last.

    Heads are advisory: they are neither leased nor waited for, and no answer depends on which are chosen.
    """

    def __init__(self, names: LoadedNames, states: Mapping[str, AdapterState] | None = None) -> None:
        """`states`: where versions are, as the engine tells; heads that it cannot load are passed over."""
        self._names = names
        self._states = states if states is not None else {}

    def heads_for(self, adaptation: Adaptation) -> LoadedHeads | None:
        """One adapter's own heads where there are such, whether a client or a request-level router chose it; the base's
        for everything else, blends and token-level gates among it. None where there are neither."""
        heads = [one for one in self._names.heads() if not self._is_broken(one)]
        version = _one_adapter(adaptation)
        own = [one for one in heads if version is not None and _is_for(one, version, self._names)]
        return _last(own) or _last(one for one in heads if one.is_for_base)

    def _is_broken(self, heads: LoadedHeads) -> bool:
        state = self._states.get(heads.version)
        return state is not None and state.error is not None


@dataclass(frozen=True, slots=True)
class HeadsFor:
    """The adapter that heads are for, for people. Both are None for the base."""

    adapter: str | None  # the name that it has here, or that was given with the heads
    version: str | None  # its content hash, where that is known
    in_use: bool  # whether there is somebody to draft for


def whom(heads: LoadedHeads, names: LoadedNames) -> HeadsFor:
    """Whom heads are for as things are now."""
    if heads.is_for_base:
        return HeadsFor(None, None, in_use=True)
    if heads.entry.adapter is not None:
        named = names.find(heads.entry.adapter)
        version = named.version if isinstance(named, LoadedAdapter) else None
        if not current_caller().sees(heads.entry.adapter):
            return HeadsFor(None, None, in_use=False)
        return HeadsFor(heads.entry.adapter, version, in_use=version is not None)
    name = next((adapter.name for adapter in names.adapters() if adapter.version == heads.info.adapter), None)
    return HeadsFor(name, heads.info.adapter, in_use=name is not None)


def _one_adapter(adaptation: Adaptation) -> str | None:
    """The version of the adapter that acts alone and as it is."""
    for version in adaptation.adapters:
        return version if adaptation == Adaptation.of(version) else None
    return None


def _is_for(heads: LoadedHeads, version: str, names: LoadedNames) -> bool:
    """By the name given when they were loaded, whatever version has it now; else by the hash in their file."""
    if heads.entry.adapter is None:
        return heads.info.adapter == version
    named = names.find(heads.entry.adapter)
    return isinstance(named, LoadedAdapter) and named.version == version


def _last(heads: Iterable[LoadedHeads]) -> LoadedHeads | None:
    by_time = sorted(heads, key=lambda one: one.entry.loaded_at)
    return by_time[-1] if by_time else None

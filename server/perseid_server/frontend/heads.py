"""Which Medusa heads draft for a request, and whom heads are for."""

from dataclasses import dataclass
from typing import Protocol

from perseid_server.frontend.adaptation import Resolved
from perseid_server.frontend.loaded import LoadedHeads
from perseid_server.frontend.loaded_names import LoadedNames


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
    served = next((adapter for adapter in names.adapters() if heads.is_for(adapter)), None)
    if served is not None:
        return HeadsFor(served.name, served.version, in_use=True)
    return HeadsFor(heads.entry.adapter, None if heads.entry.adapter else heads.info.adapter, in_use=False)


class HeadsList(Protocol):
    """Where the loaded heads are listed: the registry."""

    def heads(self) -> tuple[LoadedHeads, ...]:
        """All heads that are loaded."""


class HeadsChooser:
    """Chooses by what adapts the base; of several that fit, the heads that were loaded last.

    Heads are advisory: they are neither leased nor waited for, and no answer depends on which are chosen.
    """

    def __init__(self, registry: HeadsList) -> None:
        self._registry = registry

    def heads_for(self, resolved: Resolved) -> LoadedHeads | None:
        """One adapter's own heads where there are such, whether a client or a request-level router named it; the base's
        for everything else, blends and token-level gates among it. None where there are neither."""
        adapter, heads = resolved.adapter, self._registry.heads()
        own = [one for one in heads if adapter is not None and one.is_for(adapter)]
        return _last(own) or _last([one for one in heads if one.is_for_base])


def _last(heads: list[LoadedHeads]) -> LoadedHeads | None:
    by_time = sorted(heads, key=lambda one: one.entry.loaded_at)
    return by_time[-1] if by_time else None

"""What is loaded, by name, as far as it exists for the caller (`access.caller`).

What a caller does not see it is told nothing of: names are looked up, listed and refused as if it were not there.
"""

from collections.abc import KeysView, Mapping

from perseid_server.access.caller import current_caller
from perseid_server.adapters.names import MAX_LENGTH
from perseid_server.errors import InvalidRequest, NotFound
from perseid_server.frontend.loaded import Loaded, LoadedAdapter, LoadedGateSet, LoadedHeads


class LoadedNames:
    """Finds and lists adapters, gate sets and heads."""

    def __init__(self) -> None:
        self._loaded: dict[str, Loaded] = {}

    def get(self, name: str) -> Loaded:
        """NotFound when there is none of that name."""
        loaded = self.find(name)
        if loaded is None:
            raise NotFound(f"no adapter {name[:MAX_LENGTH]!r} is loaded", field="name")
        return loaded

    def adapter(self, name: str) -> LoadedAdapter:
        """As `get`; InvalidRequest when the name stands for something else."""
        loaded = self.get(name)
        if isinstance(loaded, LoadedGateSet):
            raise InvalidRequest(f"{name!r} is a gate set, not an adapter; ask for it with auto", field="name")
        if isinstance(loaded, LoadedHeads):
            raise InvalidRequest(
                f"{name!r} is a set of Medusa heads, where an adapter is expected; heads draft by themselves for the "
                "requests that they are for",
                field="name",
            )
        return loaded

    def find(self, name: str) -> Loaded | None:
        """As `get`, None when there is none."""
        return self._loaded.get(name) if current_caller().sees(name) else None

    def list(self) -> tuple[Loaded, ...]:
        """All adapters, gate sets and heads in the order they were loaded."""
        sees = current_caller().sees
        return tuple(loaded for name, loaded in self._loaded.items() if sees(name))

    def adapters(self) -> tuple[LoadedAdapter, ...]:
        """All adapters in the order they were loaded."""
        return tuple(loaded for loaded in self.list() if isinstance(loaded, LoadedAdapter))

    def gate_sets(self) -> tuple[LoadedGateSet, ...]:
        """All gate sets in the order they were loaded."""
        return tuple(loaded for loaded in self.list() if isinstance(loaded, LoadedGateSet))

    def heads(self) -> tuple[LoadedHeads, ...]:
        """All heads in the order they were loaded."""
        return tuple(loaded for loaded in self.list() if isinstance(loaded, LoadedHeads))

    def everyones_adapters(self) -> tuple[LoadedAdapter, ...]:
        """Of all callers: for the room they take, and for metrics. No answer may tell of them."""
        return tuple(loaded for loaded in self._loaded.values() if isinstance(loaded, LoadedAdapter))

    def names(self) -> Mapping[str, str]:
        """version → a name it has, of all callers, for metrics."""
        return {loaded.version: name for name, loaded in self._loaded.items()}

    def all_names(self) -> KeysView[str]:
        """Every name, as they are now and will be."""
        return self._loaded.keys()

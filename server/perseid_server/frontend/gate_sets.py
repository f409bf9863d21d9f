"""Gate sets: which one a request means, which of its adapters can be chosen now, and those that join it.

An adapter that does not exist for the caller is a column like that of an adapter that is not loaded: never chosen.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from perseid_server.access.caller import current_caller
from perseid_server.adapters.names import MAX_LENGTH
from perseid_server.errors import InvalidRequest, NotFound, PerseidError
from perseid_server.frontend.adaptation_options import AutoOptions
from perseid_server.frontend.leases import Leases
from perseid_server.frontend.loaded import EngineAdapters, LoadedAdapter, LoadedGateSet, what
from perseid_server.frontend.registry import AdapterRegistry

_MOST_REASONS = 8
"""More are not told: a gate set may have hundreds of columns."""


@dataclass(frozen=True, slots=True)
class Choices:
    """What the gates may choose for one request."""

    columns: tuple[LoadedAdapter | None, ...]  # in the gate set's order, joined ones behind; None: may not be chosen
    joined: tuple[LoadedAdapter, ...] = ()  # all that join, allowed or not, in the order they were loaded

    @property
    def adapters(self) -> tuple[LoadedAdapter, ...]:
        """Those that may be chosen."""
        return tuple(adapter for adapter in self.columns if adapter is not None)


@dataclass(frozen=True, slots=True)
class ColumnState:
    """An adapter of a gate set, for people."""

    name: str  # as it is loaded; as the gate set calls it where it is not
    version: str
    loaded: bool  # in the version that the gates were made for
    training_free: bool  # whether its gates were computed from the adapter


def columns_of(gate_set: LoadedGateSet, registry: AdapterRegistry) -> tuple[ColumnState, ...]:
    """The adapters of a gate set as they are now; those that do not exist for the caller are left out."""
    sees = current_caller().sees
    names = {adapter.version: adapter.name for adapter in registry.adapters()}
    training_free = gate_set.config.method == "arrow"
    return tuple(
        ColumnState(names.get(column.version, column.name), column.version, column.version in names, training_free)
        for column in gate_set.config.adapters
        if column.version in names or sees(column.name)
    )


class GateSets:
    """Finds gate sets for requests. `default`: the one that `auto` alone means where several are loaded."""

    def __init__(self, registry: AdapterRegistry, default: str | None = None) -> None:
        self._registry = registry
        self.default = default

    def find(self, name: str | None) -> LoadedGateSet:
        """The gate set a request means. NotFound where there is none, InvalidRequest where it could be any."""
        default = self.default if self.default is not None and current_caller().sees(self.default) else None
        name = name or default
        if name is None:
            return self._only_one()
        loaded = self._registry.find(name)
        if isinstance(loaded, LoadedGateSet):
            return loaded
        shown, field = repr(name[:MAX_LENGTH]), "auto.gate_set"
        if loaded is not None:
            raise InvalidRequest(f"{field}: {shown} is {what(loaded)}, not a gate set", field=field)
        raise NotFound(f"{field}: no gate set {shown} is loaded", field=field)

    def meant_by_auto(self) -> LoadedGateSet | None:
        """The gate set that `auto` alone means now, if it means one."""
        try:
            return self.find(None)
        except PerseidError:
            return None

    def choices(self, gate_set: LoadedGateSet, options: AutoOptions) -> Choices:
        """Adapters that are allowed and loaded in the version the gates were made for.

        InvalidRequest says of each why not, where none is left.
        """
        allowed = None if options.allow is None else self._versions(gate_set, options.allow)
        by_version: dict[str, LoadedAdapter] = {}  # of several names for one version, the first that is asked for
        for adapter in self._registry.adapters():
            if adapter.version not in by_version or adapter.name in (options.allow or ()):
                by_version[adapter.version] = adapter
        known = [by_version.pop(column.version, None) for column in gate_set.config.adapters]
        joined = tuple(by_version.values()) if options.join else ()
        if not any(_is_allowed(adapter, allowed) for adapter in joined):
            joined = ()
        columns = tuple(adapter if _is_allowed(adapter, allowed) else None for adapter in (*known, *joined))
        choices = Choices(columns, joined)
        if not choices.adapters:
            raise InvalidRequest(self._why_none(gate_set, options.allow), field="auto.allow")
        return choices

    def _only_one(self) -> LoadedGateSet:
        gate_sets, field = self._registry.gate_sets(), "auto.gate_set"
        if not gate_sets:
            raise NotFound(f"{field}: no gate set is loaded; load one as adapters are loaded", field=field)
        if len(gate_sets) > 1:
            names = ", ".join(repr(gate_set.name) for gate_set in gate_sets[:_MOST_REASONS])
            raise InvalidRequest(
                f"{field}: {len(gate_sets)} gate sets are loaded ({names}); name one, or let the operator choose a "
                "default with --gate-set",
                field=field,
            )
        return gate_sets[0]

    def _versions(self, gate_set: LoadedGateSet, allow: Sequence[str]) -> frozenset[str]:
        """What names stand for: the adapter that is loaded under it, else the gate set's own of that name."""
        own = _columns(gate_set)
        versions = set()
        for place, name in enumerate(allow):
            loaded = self._registry.find(name)
            if isinstance(loaded, LoadedAdapter):
                versions.add(loaded.version)
            elif name in own:
                versions.add(own[name])
            else:
                field = f"auto.allow.{place}"
                raise InvalidRequest(
                    f"{field}: {name[:MAX_LENGTH]!r} is neither a loaded adapter nor one of gate set {gate_set.name!r}",
                    field=field,
                )
        return frozenset(versions)

    def _why_none(self, gate_set: LoadedGateSet, allow: Sequence[str] | None) -> str:
        trained_for = _columns(gate_set)
        names = tuple(trained_for) if allow is None else tuple(dict.fromkeys(allow))
        reasons = [f"{name!r} {self._why_not(name, trained_for)}" for name in names[:_MOST_REASONS]]
        if len(names) > _MOST_REASONS:
            reasons.append(f"and {len(names) - _MOST_REASONS} more")
        field = "auto" if allow is None else "auto.allow"
        told = f": {', '.join(reasons)}" if reasons else ""
        return f"{field}: no adapter of gate set {gate_set.name!r} can be chosen{told}"

    def _why_not(self, name: str, trained_for: Mapping[str, str]) -> str:
        if self._registry.find(name) is None:
            return "is not loaded"
        if name in trained_for:
            return "has been replaced by another version than the gates were made for"
        return "is not in the gate set (auto.join lets it take part)"


def _columns(gate_set: LoadedGateSet) -> Mapping[str, str]:
    """name → version of the gate set's adapters, but for those that do not exist for the caller."""
    sees = current_caller().sees
    return {column.name: column.version for column in gate_set.config.adapters if sees(column.name)}


def _is_allowed(adapter: LoadedAdapter | None, allowed: Collection[str] | None) -> bool:
    """Whether it is loaded, and its version among those allowed; None: all are."""
    return adapter is not None and (allowed is None or adapter.version in allowed)


class JoinedSets:
    """Gate sets that requests make by letting adapters join another: their gates are computed by the engine.

    They are kept for the next request that asks for the same, until names change.
    """

    def __init__(self, registry: AdapterRegistry, engine: EngineAdapters) -> None:
        self._registry = registry
        self._engine = engine
        self._known: set[str] = set()
        self._outdated: set[str] = set()
        self._leases = Leases(self._freed)
        registry.on_change(self._names_changed)

    @contextmanager
    def hold(self, gate_set: LoadedGateSet, joined: Sequence[LoadedAdapter]) -> Iterator[str]:
        """The version of the gate set with these adapters behind its own. Both have to be leased already."""
        versions = tuple(adapter.version for adapter in joined)
        version = hashlib.sha256("\n".join(("joined", gate_set.version, *versions)).encode()).hexdigest()
        with self._leases.hold(version):
            if version not in self._known:
                columns = tuple(column.version for column in gate_set.config.adapters)
                path, null = self._registry.folder(gate_set), gate_set.config.null
                self._engine.register_gate_set(version, path, (*columns, *versions), null=null)
                self._known.add(version)
            self._outdated.discard(version)
            yield version

    def _names_changed(self) -> None:
        self._outdated |= self._known
        for version in self._known - self._leases.versions():
            self._forget(version)

    def _freed(self, version: str) -> None:
        if version in self._outdated:
            self._forget(version)

    def _forget(self, version: str) -> None:
        self._known.remove(version)
        self._outdated.discard(version)
        self._engine.forget_gate_set(version)

"""From what a client wants to what the engine is asked for: names become versions, and the request leases them."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

from perseid_router.gate_set import MAX_COLUMNS
from perseid_router.request_router import BASE as ROUTED_TO_BASE
from perseid_server.engine.adaptation import BASE, BASE_COLUMN, Adaptation, Routing
from perseid_server.errors import InvalidRequest, NotFound
from perseid_server.frontend.adaptation_options import AdaptationOptions, AutoOptions, BlendOf, Named
from perseid_server.frontend.gate_sets import Choices, GateSets, JoinedSets
from perseid_server.frontend.loaded import EngineAdapters, LoadedAdapter, LoadedGateSet
from perseid_server.frontend.registry import AdapterRegistry

ChosenTier = Literal["request", "token"]


@dataclass(frozen=True, slots=True)
class AutoChoice:
    """How `auto` is served."""

    gate_set: LoadedGateSet
    tier: ChosenTier  # who chooses
    joined: tuple[str, ...] = ()  # names of adapters with training-free gates
    columns: tuple[str | None, ...] = ()  # names by column, BASE_COLUMN the base; for tier "token"


@dataclass(frozen=True, slots=True)
class Resolved:
    """What adapts the base for one request, for the engine and for people."""

    adaptation: Adaptation = BASE
    adapter: LoadedAdapter | None = None  # the one that answers, where it is one as it is
    blend: tuple[tuple[LoadedAdapter, float], ...] = ()  # as asked for
    auto: AutoChoice | None = None


Decide = Callable[[Sequence[int]], Resolved]
"""Decides when the prompt's tokens are known."""


class Resolver:
    """Resolves the adaptation of requests. All methods run on the registry's event loop."""

    def __init__(self, registry: AdapterRegistry, engine: EngineAdapters, default_gate_set: str | None = None) -> None:
        """`default_gate_set`: what `auto` alone means where several are loaded."""
        self._registry = registry
        self._joined = JoinedSets(registry, engine)
        self.gate_sets = GateSets(registry, default_gate_set)

    @property
    def base_name(self) -> str:
        """What the base is called."""
        return self._registry.base_name

    @contextmanager
    def leased(self, options: AdaptationOptions | None) -> Iterator[Decide]:
        """Hold all that a request may use until it has ended. A PerseidError says what is wrong with its options."""
        with ExitStack() as leases:
            match options:
                case None:
                    yield lambda _: Resolved()
                case Named(name):
                    adapter = leases.enter_context(self._registry.lease(name))
                    yield lambda _: _explicit(adapter)
                case BlendOf(adapters):
                    blend = self._blend(adapters, leases)
                    yield lambda _: blend
                case AutoOptions():
                    yield self._auto(options, leases)

    # --- blends -------------------------------------------------------------------------------------------------

    def _blend(self, named: Sequence[tuple[str, float]], leases: ExitStack) -> Resolved:
        parts = tuple((self._adapter(f"adapters.{i}.name", name), weight) for i, (name, weight) in enumerate(named))
        for adapter, _ in parts:
            leases.enter_context(self._registry.leases.hold(adapter.version))
        weights = defaultdict[str, list[float]](list)
        for adapter, weight in parts:
            weights[adapter.version].append(weight)
        summed = {version: math.fsum(each) for version, each in weights.items()}
        adaptation = Adaptation(tuple(sorted((version, weight) for version, weight in summed.items() if weight)))
        self._refuse_too_large([adapter for adapter, _ in parts if summed[adapter.version]], "adapters")
        plain = [adapter for adapter, _ in parts if adaptation == Adaptation.of(adapter.version)]
        return Resolved(adaptation, adapter=plain[0] if plain else None, blend=parts)

    def _adapter(self, field: str, name: str) -> LoadedAdapter:
        try:
            return self._registry.adapter(name)
        except (NotFound, InvalidRequest) as error:
            raise type(error)(f"{field}: {error.message}", field=field) from error

    def _refuse_too_large(self, adapters: Iterable[LoadedAdapter], field: str) -> None:
        """Adapters that act together must be on the device together, beside those that are pinned there."""
        if self._registry.num_pages is None:
            return
        pages = {adapter.version: adapter.info.num_pages for adapter in adapters}
        pinned = {one.version: one.info.num_pages for one in self._registry.everyones_adapters() if one.entry.pinned}
        seen = {one.version for one in self._registry.adapters() if one.entry.pinned}
        others = sum(count for version, count in pinned.items() if version not in pages and version in seen)
        unseen = sum(count for version, count in pinned.items() if version not in pages and version not in seen)
        needed, room = sum(pages.values()), self._registry.num_pages - others
        if room - unseen < needed <= room:  # whose they are, and how many, is nothing for this caller
            raise InvalidRequest(f"{field}: there is no room for these adapters together now", field=field)
        if needed > room:
            beside = f" beside {others} of pinned adapters" if others else ""
            mend = "name fewer adapters" if field == "adapters" else "allow fewer adapters with auto.allow"
            raise InvalidRequest(
                f"{field}: the {len(pages)} adapters take {needed} pages of adapter memory together, and the server "
                f"has room for {room}{beside}; {mend}, or let the operator raise --adapter-memory",
                field=field,
            )

    # --- auto ---------------------------------------------------------------------------------------------------

    def _auto(self, options: AutoOptions, leases: ExitStack) -> Decide:
        gate_set = self.gate_sets.find(options.gate_set)
        choices = self.gate_sets.choices(gate_set, options)
        num_columns = len(choices.columns) + gate_set.config.null
        if num_columns > MAX_COLUMNS:
            raise InvalidRequest(
                f"auto.join: {len(choices.joined)} adapters would join gate set {gate_set.name!r}, which makes "
                f"{num_columns} columns; the most are {MAX_COLUMNS}",
                field="auto.join",
            )
        if options.k is not None and options.k > num_columns:
            raise InvalidRequest(
                f"auto.k is {options.k}; gate set {gate_set.name!r} has {num_columns} columns", field="auto.k"
            )
        if options.tier == "request":
            _refuse_without_router(gate_set, choices)
        for version in {gate_set.version, *(one.version for one in (*choices.adapters, *choices.joined))}:
            leases.enter_context(self._registry.leases.hold(version))
        return lambda prompt: self._decide(prompt, gate_set, choices, options, leases)

    def _decide(
        self,
        prompt_token_ids: Sequence[int],
        gate_set: LoadedGateSet,
        choices: Choices,
        options: AutoOptions,
        leases: ExitStack,
    ) -> Resolved:
        column = _choose_once(prompt_token_ids, gate_set, choices, options)
        if column is not None:
            auto = AutoChoice(gate_set, "request")
            adapter = None if column == ROUTED_TO_BASE else choices.columns[column]
            return Resolved(Adaptation.of(adapter.version if adapter else None), adapter, auto=auto)
        self._refuse_too_large(choices.adapters, "auto")
        version = gate_set.version
        if choices.joined:
            version = leases.enter_context(self._joined.hold(gate_set, choices.joined))
        base = (BASE_COLUMN if options.null else None,) if gate_set.config.null else ()
        routing = Routing(
            gate_set=version,
            columns=(*(adapter.version if adapter else None for adapter in choices.columns), *base),
            k=options.k or gate_set.config.k,
            temperature=options.temperature or gate_set.config.temperature,
        )
        names = (*(adapter.name if adapter else None for adapter in choices.columns), *base)
        joined = tuple(adapter.name for adapter in choices.joined if adapter in choices.adapters)
        return Resolved(Adaptation(routing=routing), auto=AutoChoice(gate_set, "token", joined, names))


def _explicit(adapter: LoadedAdapter) -> Resolved:
    return Resolved(Adaptation.of(adapter.version), adapter)


def _refuse_without_router(gate_set: LoadedGateSet, choices: Choices) -> None:
    if gate_set.router is None:
        why = "has no request-level router"
    elif not any(choices.columns[: len(gate_set.config.adapters)]):
        why = "has a request-level router that knows none of the allowed adapters"
    else:
        return
    raise InvalidRequest(f"auto.tier: gate set {gate_set.name!r} {why}; use tier token or auto", field="auto.tier")


def _choose_once(
    prompt_token_ids: Sequence[int], gate_set: LoadedGateSet, choices: Choices, options: AutoOptions
) -> int | None:
    """The request-level router's column, ROUTED_TO_BASE for the base; None where the gates shall choose.

    It does not know adapters that join, and takes what is theirs for the base's: where some do, it is asked only when
    forced.
    """
    router = gate_set.router
    if router is None or options.tier == "token" or (choices.joined and options.tier == "auto"):
        return None
    own = choices.columns[: len(gate_set.config.adapters)]
    allowed = [place for place, adapter in enumerate(own) if adapter is not None]
    base_allowed = gate_set.config.null and options.null
    if options.tier == "auto":
        return router.decide(prompt_token_ids, [*allowed, ROUTED_TO_BASE] if base_allowed else allowed)
    shares = router.evidence(prompt_token_ids).probabilities  # one class for each adapter, then the base
    guess = max([*allowed, len(own)] if base_allowed else allowed, key=lambda column: float(shares[column]))
    return ROUTED_TO_BASE if guess == len(own) else guess

"""How a body says what adapts the base: `model`, `adapters`, `auto` and `routing`."""

from collections.abc import Sequence
from typing import Literal

from perseid_server.api.http.bounded import Bounded, Options
from perseid_server.errors import InvalidRequest
from perseid_server.frontend.adaptation_options import AdaptationOptions, AutoOptions, BlendOf, Named

_AUTO = "auto"


class WeightedAdapterBody(Options):
    """One adapter of a blend."""

    name: str
    weight: float = 1.0


class AutoBody(Options):
    """Options of `auto`; what is left out is the gate set's own business."""

    gate_set: str | None = None
    allow: Bounded[str] | None = None
    k: int | None = None
    temperature: float | None = None
    tier: Literal["auto", "request", "token"] = "auto"
    null: bool = True
    join: bool = False

    def options(self, gate_set: str | None) -> AutoOptions:
        """`gate_set`: as `model` names it."""
        allow = None if self.allow is None else tuple(self.allow)
        return AutoOptions(gate_set or self.gate_set, allow, self.k, self.temperature, self.tier, self.null, self.join)


def adaptation_of(
    model: str, base: str, adapters: Sequence[WeightedAdapterBody] | None, auto: AutoBody | None
) -> AdaptationOptions | None:
    """`base` and `base:` are the base itself; `adapter` and `base:adapter` name an adapter; `auto`, `auto:gate_set`
    and both behind `base:` leave the choice to gates. A blend is asked for with the base's name.
    """
    name = "" if model == base else model.removeprefix(f"{base}:")
    mode, _, gate_set = name.partition(":")
    if adapters is not None:
        _refuse_beside_a_blend(name, base, auto)
        return BlendOf(tuple((adapter.name, adapter.weight) for adapter in adapters))
    if mode == _AUTO:
        return _auto(gate_set or None, auto or AutoBody())
    if auto is not None:
        raise InvalidRequest('auto: these options need model "auto" or "auto:GATE_SET"', field="auto")
    return Named(name) if name else None


def _auto(gate_set: str | None, auto: AutoBody) -> AutoOptions:
    if gate_set and auto.gate_set and auto.gate_set != gate_set:
        raise InvalidRequest("auto.gate_set: model names another gate set; name one of them", field="auto.gate_set")
    return auto.options(gate_set)


def _refuse_beside_a_blend(name: str, base: str, auto: AutoBody | None) -> None:
    if auto is not None:
        raise InvalidRequest("adapters: expected either adapters or auto; leave one out", field="adapters")
    if name:
        raise InvalidRequest(f"adapters: a blend needs the base as model; expected model {base!r}", field="adapters")

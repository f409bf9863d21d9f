"""What a client wants the base adapted by, and the checks that need no adapter to be looked up."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from perseid_router.gate_set_config import MAX_TEMPERATURE, MIN_TEMPERATURE
from perseid_server.errors import InvalidRequest

MAX_BLEND = 8
MAX_WEIGHT = 16.0
MAX_ALLOW = 512

Tier = Literal["auto", "request", "token"]
"""Who chooses: the request-level router where it is sure and the gates elsewhere, or always one of the two."""

Report = Literal["none", "summary", "tokens"]


@dataclass(frozen=True, slots=True)
class Named:
    """One adapter, by name."""

    adapter: str


@dataclass(frozen=True, slots=True)
class BlendOf:
    """A weighted sum: (name, weight) of each adapter."""

    adapters: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class AutoOptions:
    """A gate set's choice. None: the gate set's own value, or for `gate_set` the one that is loaded."""

    gate_set: str | None = None
    allow: tuple[str, ...] | None = None  # names that may be chosen; None: all
    k: int | None = None
    temperature: float | None = None
    tier: Tier = "auto"
    null: bool = True  # whether the base may be chosen
    join: bool = False  # whether adapters that the gate set does not know take part, with training-free gates


AdaptationOptions = Named | BlendOf | AutoOptions


def check_adaptation(options: AdaptationOptions | None, report: Report, num_choices: int) -> None:
    """InvalidRequest names the first field that is out of range and what was expected."""
    if report != "none":
        if not isinstance(options, AutoOptions):
            raise InvalidRequest("routing: there is a report only of what auto chose; leave it out", field="routing")
        if num_choices != 1:
            raise InvalidRequest(f"routing: a report is of one answer; expected n = 1, not {num_choices}", field="n")
    match options:
        case BlendOf(adapters):
            _check_blend(adapters)
        case AutoOptions():
            _check_auto(options)


def _check_blend(adapters: Sequence[tuple[str, float]]) -> None:
    if not 0 < len(adapters) <= MAX_BLEND:
        raise InvalidRequest(f"adapters: {len(adapters)} to blend; expected 1 to {MAX_BLEND}", field="adapters")
    seen: set[str] = set()
    for place, (name, weight) in enumerate(adapters):
        if name in seen:
            field = f"adapters.{place}.name"
            raise InvalidRequest(f"{field}: an adapter is named twice; add its weights up", field=field)
        seen.add(name)
        if not (math.isfinite(weight) and abs(weight) <= MAX_WEIGHT):
            field = f"adapters.{place}.weight"
            limit = f"{MAX_WEIGHT:g}"
            raise InvalidRequest(f"{field} is {weight:g}; expected a number in [-{limit}, {limit}]", field=field)


def _check_auto(options: AutoOptions) -> None:
    if options.allow is not None and not 0 < len(options.allow) <= MAX_ALLOW:
        raise InvalidRequest(
            f"auto.allow has {len(options.allow)} names; expected 1 to {MAX_ALLOW}, or leave it out to allow all",
            field="auto.allow",
        )
    if options.k is not None and options.k < 1:
        raise InvalidRequest(f"auto.k is {options.k}; expected a whole number from 1", field="auto.k")
    low, high = MIN_TEMPERATURE, MAX_TEMPERATURE
    if options.temperature is not None and not low <= options.temperature <= high:  # also NaN
        raise InvalidRequest(
            f"auto.temperature is {options.temperature:g}; expected a number in [{low:g}, {high:g}]",
            field="auto.temperature",
        )

"""How a client wants its request drafted for, and the checks that need no heads to be looked up."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import get_args

from perseid_server.errors import InvalidRequest
from perseid_server.speculation.options import OFF, Acceptance, Mode

MODES: Mapping[str, Mode] = {mode: mode for mode in get_args(Mode)}
ACCEPTANCES: Mapping[str, Acceptance] = {acceptance: acceptance for acceptance in get_args(Acceptance)}


@dataclass(frozen=True, slots=True)
class TypicalOptions:
    """A draft x is accepted where p(x) > min(epsilon, delta · e^(−H)), H the entropy of p in nats."""

    epsilon: float = OFF.epsilon
    delta: float = OFF.delta


@dataclass(frozen=True, slots=True)
class SpeculationOptions:
    """As a client states them; the first two are any text until they are checked."""

    mode: str | None = None  # None: the server's default
    acceptance: str = "exact"
    typical: TypicalOptions | None = None  # with acceptance "typical" only; None: the defaults


def check_speculation(options: SpeculationOptions) -> None:
    """InvalidRequest names the first field that is out of range and what was expected."""
    if options.mode is not None:
        _one_of("speculation", options.mode, MODES)
    _one_of("acceptance", options.acceptance, ACCEPTANCES)
    if options.typical is None:
        return
    if options.acceptance != "typical":
        raise InvalidRequest('typical: allowed only with acceptance "typical"', field="typical")
    _share("typical.epsilon", options.typical.epsilon)
    _share("typical.delta", options.typical.delta)


def _one_of(field: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        expected = ", ".join(f'"{each}"' for each in allowed)
        raise InvalidRequest(f"{field} is {value[:20]!r}; expected one of {expected}", field=field)


def _share(field: str, value: float) -> None:
    if not (math.isfinite(value) and 0.0 < value <= 1.0):
        raise InvalidRequest(f"{field} is {value:g}; expected a number in (0, 1]", field=field)

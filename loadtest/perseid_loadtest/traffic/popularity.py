"""Which adapter a request asks for."""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from perseid_server.errors import InvalidRequest

FIELD = "popularity"
HOT_SHARE = 0.9
EXPECTED = "expected zipf:S (such as zipf:1.0), uniform, round-robin, hot:NAME or hot:NAME=SHARE"


class Popularity(Protocol):
    """How requests spread over adapters."""

    def pick(self, number: int, draw: random.Random) -> str: ...


@dataclass(frozen=True, slots=True)
class Weighted:
    """The i-th name is asked for with probability weights[i] / Σ weights."""

    names: tuple[str, ...]
    cumulative: tuple[float, ...]  # sums of the weights so far

    @staticmethod
    def of(names: Sequence[str], weights: Sequence[float]) -> "Weighted":
        """Weights in the order of the names."""
        return Weighted(tuple(names), tuple(itertools.accumulate(weights)))

    def pick(self, number: int, draw: random.Random) -> str:  # noqa: ARG002  each is drawn alike
        """A name."""
        return draw.choices(self.names, cum_weights=self.cumulative)[0]


@dataclass(frozen=True, slots=True)
class RoundRobin:
    """One after the other."""

    names: tuple[str, ...]

    def pick(self, number: int, draw: random.Random) -> str:  # noqa: ARG002  nothing is drawn
        """The name whose turn it is."""
        return self.names[number % len(self.names)]


def zipf(names: Sequence[str], exponent: float) -> Weighted:
    """The name of rank r, counted from 1, has the share r^−s / Σ r^−s; s = 0 is uniform."""
    return Weighted.of(names, [rank**-exponent for rank in range(1, len(names) + 1)])


def hot(names: Sequence[str], name: str, share: float) -> Weighted:
    """One name has this share, the others have the rest between them."""
    others = len(names) - 1
    rest = (1.0 - share) / others if others else 0.0
    return Weighted.of(names, [share if each == name else rest for each in names])


def parse_popularity(text: str, names: Sequence[str]) -> Popularity:
    """Popularity of these names, in the order of rank. InvalidRequest when the text cannot be read."""
    kind, _, detail = text.partition(":")
    if text == "uniform":
        return zipf(names, 0.0)
    if text == "round-robin":
        return RoundRobin(tuple(names))
    if kind == "zipf":
        return zipf(names, _number(text, detail, 0.0, 100.0, "zipf:S with a number from 0 to 100"))
    if kind == "hot":
        name, separator, share = detail.rpartition("=")
        name = name if separator else detail
        wanted = "hot:NAME=SHARE with a share from 0 to 1"
        part = _number(text, share, 0.0, 1.0, wanted) if separator else HOT_SHARE
        if part == 0.0 and set(names) == {_known(name, names)}:
            wanted = "expected a share above 0, or other --adapters beside it"
            raise InvalidRequest(f"--popularity {text!r}: nothing is left to ask for; {wanted}", field=FIELD)
        return hot(names, _known(name, names), part)
    raise InvalidRequest(f"--popularity {text!r}: {EXPECTED}", field=FIELD)


def _number(text: str, detail: str, least: float, most: float, wanted: str) -> float:
    try:
        value = float(detail)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise InvalidRequest(f"--popularity {text!r}: expected {wanted}", field=FIELD)
    return value


def _known(name: str, names: Sequence[str]) -> str:
    wanted = "" if name == "base" else name
    if wanted not in names:
        listed = ", ".join(each or "base" for each in names)
        raise InvalidRequest(f"--popularity hot:{name}: not among --adapters ({listed})", field=FIELD)
    return wanted

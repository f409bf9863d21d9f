"""When requests are due in an open loop: at moments that do not depend on how fast the server answers."""

import json
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from perseid_loadtest.traffic.lengths import MOST
from perseid_server.errors import InvalidRequest

FIELD = "arrivals"
EXPECTED = "expected poisson, gamma:BURSTINESS (such as gamma:0.5) or trace:FILE"


@dataclass(frozen=True, slots=True)
class Due:
    """A moment, and what a trace says of the request that is due then. None: drawn as for any other."""

    at: float  # seconds since the run began
    adapter: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None


class Arrivals(Protocol):
    """Moments in order, without end or as long as a trace has some."""

    def due(self, draw: random.Random) -> Iterator[Due]: ...


@dataclass(frozen=True, slots=True)
class Gamma:
    """Gaps from a gamma distribution: shape k = burstiness, mean 1 / rate, variance 1 / (k · rate²).

    k = 1 is a Poisson process; below it requests come in bursts, above it more evenly. As in vLLM's benchmark.
    """

    rate: float  # requests a second
    burstiness: float = 1.0

    def due(self, draw: random.Random) -> Iterator[Due]:
        """Moments without end."""
        scale = 1.0 / (self.rate * self.burstiness)
        moment = 0.0
        while True:
            moment += draw.gammavariate(self.burstiness, scale)
            yield Due(moment)


@dataclass(frozen=True, slots=True)
class Trace:
    """What was recorded elsewhere, again."""

    moments: tuple[Due, ...]

    def due(self, draw: random.Random) -> Iterator[Due]:  # noqa: ARG002  nothing is drawn
        """Every moment of the trace, once."""
        return iter(self.moments)


def parse_arrivals(text: str, rate: float | None) -> Arrivals:
    """Arrivals from `--arrivals` and `--rate`. InvalidRequest when they contradict each other or cannot be read."""
    kind, separator, detail = text.partition(":")
    if kind == "trace" and separator:
        if rate is not None:
            raise InvalidRequest("--rate: leave it out, the trace says when requests are due", field="rate")
        return read_trace(Path(detail))
    if rate is None:
        raise InvalidRequest(f"--arrivals {text}: needs --rate, requests a second", field=FIELD)
    if text == "poisson":
        return Gamma(rate)
    if kind == "gamma":
        return Gamma(rate, _burstiness(detail))
    raise InvalidRequest(f"--arrivals {text!r}: {EXPECTED}", field=FIELD)


def _burstiness(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.01 <= value <= 1000:  # beyond, gaps are all at one moment or all alike, and draws lose their precision
        raise InvalidRequest(
            f"--arrivals gamma:{text}: expected gamma:BURSTINESS with a number from 0.01 (bursts) to 1000 (even)",
            field=FIELD,
        )
    return value


def read_trace(path: Path) -> Trace:
    """A file with a line for each request: its moment in seconds, or a JSON object {"at", "adapter",
    "prompt_tokens", "output_tokens"} of which all but "at" may be left out. InvalidRequest names the line."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InvalidRequest(f"--arrivals trace:{path}: {reason}", field=FIELD) from error
    moments = [_due(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not moments:
        raise InvalidRequest(f"--arrivals trace:{path}: the file has no line", field=FIELD)
    return Trace(tuple(sorted(moments, key=lambda due: due.at)))


def _due(path: Path, number: int, line: str) -> Due:
    try:
        told = json.loads(line)
        fields = told if isinstance(told, dict) else {"at": told}
        return Due(_moment(fields.pop("at")), _text(fields), _count(fields, "prompt_tokens"), _last(fields))
    except (ValueError, KeyError, RecursionError, OverflowError) as error:
        wanted = (
            'expected a moment in seconds, or {"at": 1.5, "adapter": "a", "prompt_tokens": 64, "output_tokens": 32}'
        )
        shown = f": {error}" if type(error) is ValueError else ""
        raise InvalidRequest(f"--arrivals trace:{path}, line {number}: {wanted}{shown}", field=FIELD) from error


def _moment(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"the moment is {value!r}")
    return float(value)


def _text(fields: dict[str, Any]) -> str | None:
    value = fields.pop("adapter", None)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"adapter is {value!r}")
    return value


def _count(fields: dict[str, Any], name: str) -> int | None:
    value = fields.pop(name, None)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST):
        raise ValueError(f"{name} is {value!r}")
    return value


def _last(fields: dict[str, Any]) -> int | None:
    count = _count(fields, "output_tokens")
    _refuse_others(fields)
    return count


def _refuse_others(fields: Mapping[str, Any]) -> None:
    if fields:
        raise ValueError(f"unknown field {next(iter(fields))!r}")

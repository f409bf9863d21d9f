"""What a request has to keep to be a good one."""

import re
from dataclasses import dataclass, fields
from typing import Self

from perseid_loadtest.analysis import formatting
from perseid_loadtest.analysis.latencies import answered, first_token_by, gaps, tpot
from perseid_loadtest.traffic.record import RequestRecord
from perseid_server.errors import InvalidRequest

_UNITS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_TIME = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(us|µs|ms|s|min)", re.ASCII)
_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e": "end to end"}


@dataclass(frozen=True, slots=True)
class Slo:
    """Upper limits, s; None: no limit. They hold for each request, and latencies count from the planned arrival."""

    ttft_s: float | None = None  # time to first token
    tpot_s: float | None = None  # time per output token: the mean of an answer
    itl_s: float | None = None  # the longest gap between two chunks
    e2e_s: float | None = None  # until the whole answer is there

    @classmethod
    def parse(cls, text: str) -> Self:
        """From "ttft=500ms,tpot=50ms,e2e=5s". InvalidRequest with what was expected on anything else."""
        limits: dict[str, float] = {}
        for part in text.split(","):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or name not in _NAMES:
                raise _error(f"{part.strip()!r} is no limit; give NAME=TIME with a name of {', '.join(_NAMES)}")
            if f"{name}_s" in limits:
                raise _error(f"{name} is given twice")
            limits[f"{name}_s"] = _seconds(name, value)
        return cls(**limits)

    def met_by(self, record: RequestRecord) -> bool:
        """Whether the request was answered within all limits. What an answer does not have (TPOT of one token, gaps of
        one chunk) breaks none; an answer without a token breaks any limit on the first."""
        if not answered(record):
            return False
        return not (
            _beyond(self.ttft_s, first_token_by(record))
            or _beyond(self.tpot_s, tpot(record))
            or _beyond(self.itl_s, max(gaps(record), default=None))
            or _beyond(self.e2e_s, record.latency)
        )

    def describe(self) -> str:
        """For people: TTFT ≤ 500 ms, end to end ≤ 5.00 s."""
        limits = [(field.name.removesuffix("_s"), getattr(self, field.name)) for field in fields(self)]
        told = [f"{_NAMES[name]} ≤ {formatting.seconds(limit)}" for name, limit in limits if limit is not None]
        return ", ".join(told) or "no limits"


def _seconds(name: str, value: str) -> float:
    found = _TIME.fullmatch(value)
    if found is None:
        raise _error(f"{name}={value}: expected a time with its unit (us, ms, s, min), such as {name}=500ms")
    limit = float(found[1]) * _UNITS[found[2]]
    if not 0.0 < limit < float("inf"):
        raise _error(f"{name}={value}: expected more than nothing; leave {name} out for no limit")
    return limit


def _beyond(limit: float | None, value: float | None) -> bool:
    return limit is not None and value is not None and not value <= limit  # NaN is beyond


def _error(what: str) -> InvalidRequest:
    return InvalidRequest(f"slo: {what} (example: ttft=500ms,tpot=50ms,e2e=5s)", field="slo")

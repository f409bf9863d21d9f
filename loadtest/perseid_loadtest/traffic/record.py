"""What a load test writes down: one record for each request. Moments are seconds since the run began."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from perseid_loadtest.drive import Arrival


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request, answered or not. Latencies count from `planned`: a client that is late is part of the wait."""

    number: int
    adapter: str  # "" the base
    planned: float  # when it was due (closed loop: when its client was free)
    sent: float
    ended: float
    arrivals: tuple[Arrival, ...] = ()  # with tokens, in order; an answer that is not streamed is one
    prompt_tokens: int = 0
    output_tokens: int = 0
    streamed: bool = True
    tokens_told: bool = True  # False: not counted by the server, each chunk of text is taken for one
    warm_up: bool = False  # not counted
    error: str | None = None  # its kind: HTTP status or gRPC code, "timeout", "connection", "client", …
    message: str = ""  # the server's words, shortened
    retry_after_s: float | None = None

    @property
    def ttft(self) -> float | None:
        """Time to first token, s, from the planned arrival."""
        return self.arrivals[0].moment - self.planned if self.arrivals else None

    @property
    def latency(self) -> float:
        """End to end, s, from the planned arrival."""
        return self.ended - self.planned


@dataclass(frozen=True, slots=True)
class ChurnRecord:
    """One load, unload or replacement of an adapter while traffic ran."""

    action: str  # "load", "unload", "replace"
    adapter: str
    started: float
    ended: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """Everything one load test brought."""

    target: str
    options: Mapping[str, Any]  # as asked for, for the report: rate or concurrency, popularity, lengths, …
    started_at: float  # unix time
    seconds: float  # of measuring, without warm-up, until the last answer
    records: tuple[RequestRecord, ...]
    churn: tuple[ChurnRecord, ...] = ()
    client_busy: float = 0.0  # share of its core that the load generator used
    most_late_s: float = 0.0  # 99th percentile of sent − planned in an open loop
    server_before: Mapping[str, float] = field(default_factory=dict)  # samples of /metrics: name{labels} → value
    server_after: Mapping[str, float] = field(default_factory=dict)
    server_untold: str | None = None  # why there are none, where the server may have some
    stopped_early: str | None = None  # why
    window_s: float = 0.0  # of `seconds`, those in which requests were due; 0: a closed loop, or not known
    not_put_back: tuple[ChurnRecord, ...] = ()  # what failed of undoing the churn, after the run
    stops_at_eos: bool = False  # the server refused ignore_eos, so lengths of answers are its own

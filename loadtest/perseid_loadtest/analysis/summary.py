"""The figures of a run. Warm-up is left out of all of them; latencies count from the planned arrival.

Latencies and tokens are those of answered requests (no error); a failed request counts among the requests, the errors
and what did not meet the limits. Rates are per second of measuring, which lasts until the last answer; but what was due
is per second of sending, or an overload would hide itself.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from perseid_loadtest.analysis.adapter_figures import AdapterFigures, adapter_figures, fairness
from perseid_loadtest.analysis.client_figures import ClientFigures, client_figures
from perseid_loadtest.analysis.distribution import Distribution
from perseid_loadtest.analysis.latencies import answered, gaps, tokens_of, tpot
from perseid_loadtest.analysis.server_metrics import ServerFigures, server_figures
from perseid_loadtest.analysis.slo import Slo
from perseid_loadtest.traffic.record import ChurnRecord, RequestRecord, Run


@dataclass(frozen=True, slots=True)
class Goodput:
    """Requests that met the limits."""

    slo: Slo
    requests: int
    requests_per_s: float | None
    share: float | None  # of all requests, the failed ones included; None without requests


@dataclass(frozen=True, slots=True)
class ErrorFigures:
    """Requests that failed in one way."""

    kind: str
    count: int
    example: str  # the first one's message


@dataclass(frozen=True, slots=True)
class ChurnFigures:
    """Loads, unloads or replacements of adapters while traffic ran."""

    action: str
    count: int
    errors: int
    seconds: Distribution | None  # of those that succeeded
    example: str = ""  # the first error


@dataclass(frozen=True, slots=True)
class Summary:
    """All figures of one run. None: nothing to measure it by. Times in seconds."""

    target: str
    seconds: float  # of measuring
    requests: int
    answered: int
    failed: int
    empty: int  # answered without a single token
    prompt_tokens: int
    output_tokens: int
    offered_per_s: float | None  # requests that were due, a second of sending; None in a closed loop
    requests_per_s: float | None  # answered
    output_tokens_per_s: float | None
    prompt_tokens_per_s: float | None
    ttft: Distribution | None  # planned arrival to first token; of an answer that is not streamed, to all of it
    itl: Distribution | None  # between two chunks that follow each other in an answer, however many tokens they hold
    tpot: Distribution | None  # (last chunk − first chunk) / (tokens − 1), of each answer that came in chunks
    e2e: Distribution | None  # planned arrival to end
    goodput: Goodput | None  # None without limits
    errors: tuple[ErrorFigures, ...]  # the most frequent first
    adapters: tuple[AdapterFigures, ...]  # the most asked for first
    jain: float | None  # over adapters, of the mean of end-to-end latency ÷ output tokens; None below two adapters
    client: ClientFigures
    churn: tuple[ChurnFigures, ...] = ()
    uncounted: int = 0  # answers whose tokens the server did not count
    server: ServerFigures = field(default_factory=ServerFigures)
    server_untold: str | None = None  # why there are none
    stopped_early: str | None = None
    stops_at_eos: bool = False  # the server refused ignore_eos, so lengths of answers are its own
    not_put_back: tuple[ChurnRecord, ...] = ()  # changes after the run that failed: the server is not as it was


def summarise(run: Run, slo: Slo | None = None) -> Summary:
    """All figures; goodput where there are limits."""
    records = measured(run)
    good = [record for record in records if answered(record)]
    prompt_tokens, output_tokens = sum(record.prompt_tokens for record in good), sum(map(tokens_of, good))
    adapters = adapter_figures(records)
    ttft = Distribution.of(record.ttft for record in good if record.ttft is not None)
    return Summary(
        target=run.target,
        seconds=run.seconds,
        requests=len(records),
        answered=len(good),
        failed=len(records) - len(good),
        empty=sum(tokens_of(record) == 0 for record in good),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        offered_per_s=_rate(len(records), run.window_s),
        requests_per_s=_rate(len(good), run.seconds),
        output_tokens_per_s=_rate(output_tokens, run.seconds),
        prompt_tokens_per_s=_rate(prompt_tokens, run.seconds),
        ttft=ttft,
        itl=Distribution.of(gap for record in good for gap in gaps(record)),
        tpot=Distribution.of(value for record in good if (value := tpot(record)) is not None),
        e2e=Distribution.of(record.latency for record in good),
        goodput=None if slo is None else _goodput(records, slo, run.seconds),
        errors=_errors(records),
        adapters=adapters,
        jain=fairness(adapters),
        client=client_figures(run, records, ttft),
        churn=_churn(run.churn),
        uncounted=sum(not record.tokens_told for record in good),
        server=server_figures(run.server_before, run.server_after),
        server_untold=run.server_untold,
        stopped_early=run.stopped_early,
        stops_at_eos=run.stops_at_eos,
        not_put_back=run.not_put_back,
    )


def measured(run: Run) -> list[RequestRecord]:
    """The records that count."""
    return [record for record in run.records if not record.warm_up]


def _rate(count: float, seconds: float) -> float | None:
    return count / seconds if seconds > 0 else None


def _goodput(records: Sequence[RequestRecord], slo: Slo, seconds: float) -> Goodput:
    met = sum(slo.met_by(record) for record in records)
    return Goodput(slo, met, _rate(met, seconds), met / len(records) if records else None)


def _errors(records: Sequence[RequestRecord]) -> tuple[ErrorFigures, ...]:
    failed = [record for record in records if record.error is not None]
    counted = Counter(record.error or "" for record in failed).most_common()
    return tuple(
        ErrorFigures(
            kind, count, next((record.message for record in failed if record.error == kind and record.message), "")
        )
        for kind, count in counted
    )


def _churn(records: Sequence[ChurnRecord]) -> tuple[ChurnFigures, ...]:
    figures = []
    for action in dict.fromkeys(record.action for record in records):
        own = [record for record in records if record.action == action]
        errors = [record.error for record in own if record.error is not None]
        taken = Distribution.of(record.ended - record.started for record in own if record.error is None)
        figures.append(ChurnFigures(action, len(own), len(errors), taken, next(iter(errors), "")))
    return tuple(figures)

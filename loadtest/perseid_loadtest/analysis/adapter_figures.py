"""How each adapter's requests fared, and whether all fared alike."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from perseid_loadtest.analysis.distribution import Distribution, jain_index
from perseid_loadtest.analysis.latencies import answered, normalised_latency, tokens_of
from perseid_loadtest.traffic.record import RequestRecord


@dataclass(frozen=True, slots=True)
class AdapterFigures:
    """The requests of one adapter. None: no answer to measure it by."""

    adapter: str  # "" the base
    requests: int
    errors: int
    output_tokens: int
    ttft_p50: float | None  # s, of the answered ones
    ttft_p99: float | None
    normalised_latency: float | None  # s: mean over its answers of end-to-end latency ÷ output tokens


def adapter_figures(records: Sequence[RequestRecord]) -> tuple[AdapterFigures, ...]:
    """One for each adapter, the most asked for first."""
    by_adapter: dict[str, list[RequestRecord]] = defaultdict(list)
    for record in records:
        by_adapter[record.adapter].append(record)
    figures = [_figures(adapter, own) for adapter, own in by_adapter.items()]
    return tuple(sorted(figures, key=lambda one: (-one.requests, one.adapter)))


def fairness(adapters: Sequence[AdapterFigures]) -> float | None:
    """Jain's index over adapters of `normalised_latency`: 1 where a token takes the requests of each as long, whatever
    it is. None where fewer than two adapters have answers: there is nothing to compare."""
    return jain_index(one.normalised_latency for one in adapters if one.normalised_latency is not None)


def starved(adapters: Sequence[AdapterFigures]) -> list[str]:
    """Adapters that were asked for and never answered; the index does not know of them."""
    return [one.adapter for one in adapters if one.requests == one.errors]


def _figures(adapter: str, records: Sequence[RequestRecord]) -> AdapterFigures:
    good = [record for record in records if answered(record)]
    ttft = Distribution.of(record.ttft for record in good if record.ttft is not None)
    per_token = Distribution.of(value for record in good if (value := normalised_latency(record)) is not None)
    return AdapterFigures(
        adapter,
        requests=len(records),
        errors=len(records) - len(good),
        output_tokens=sum(map(tokens_of, good)),
        ttft_p50=ttft.p50 if ttft else None,
        ttft_p99=ttft.p99 if ttft else None,
        normalised_latency=per_token.mean if per_token else None,
    )

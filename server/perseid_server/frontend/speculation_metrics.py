"""Prometheus metrics of drafting ahead. Names are vLLM's where it has them (`spec_decode_…`), with our prefix.

Tokens per step, by adapter, and the share of drafts that were accepted:

    rate(perseid_spec_decode_num_tokens_total[5m]) / rate(perseid_spec_decode_num_steps_total[5m])
    rate(perseid_spec_decode_num_accepted_tokens_total[5m]) / rate(perseid_spec_decode_num_draft_tokens_total[5m])
"""

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge

from perseid_server.engine.adaptation import BASE_COLUMN
from perseid_server.engine.messages import BLENDED, ROUTED, EngineStats, SpeculationStats

LabelOf = Callable[[str, Mapping[str, str]], str]
"""The label of a version, given the names of versions."""

_FIXED = {BASE_COLUMN: "base", BLENDED: "blend", ROUTED: "auto"}


class SpeculationMetrics:
    """What drafting brings, by what adapts the base: an adapter's name, base, blend or auto."""

    def __init__(self, registry: CollectorRegistry, label_of: LabelOf) -> None:
        """`label_of` caps the labels."""
        self._label_of = label_of
        self._seen: dict[str, SpeculationStats] = {}

        def counter(name: str, text: str) -> Counter:
            return Counter(f"perseid_spec_decode_{name}", text, ("adapter",), registry=registry)

        self.steps = counter(
            "num_steps",
            "Decode steps of sequences that ask for drafts, each for itself. Tokens per step is "
            "rate(perseid_spec_decode_num_tokens_total[5m]) / rate(perseid_spec_decode_num_steps_total[5m]).",
        )
        self.tokens = counter("num_tokens", "Tokens that these steps brought.")
        self.drafted = counter("num_draft_tokens", "Drafted tokens that were checked.")
        self.accepted = counter("num_accepted_tokens", "Drafted tokens that were accepted.")
        self.saved = Gauge(  # no counter: a step whose drafts all fail takes something away
            "perseid_spec_decode_saved_seconds",
            "Estimate: what accepted tokens would have cost, less what drafting did, added up since the start.",
            ("adapter",),
            registry=registry,
        )
        self.budget = Gauge("perseid_spec_decode_budget_rows", "Rows for drafts in the last step.", registry=registry)

    def engine_ready(self) -> None:
        """A new engine counts from zero."""
        self._seen.clear()

    def engine_stepped(self, stats: EngineStats, names: Mapping[str, str]) -> None:
        """Take over what is new. `stats` tells what its step has counted. `names`: adapter version → name."""
        self.budget.set(stats.draft_budget)
        for now in stats.speculation:
            earlier = self._seen.get(now.adapter, SpeculationStats(now.adapter))
            if now.steps < earlier.steps:  # the version was forgotten and has come back: it counts anew
                earlier = SpeculationStats(now.adapter)
            self._seen[now.adapter] = now
            if now != earlier:
                self._add(_FIXED.get(now.adapter) or self._label_of(now.adapter, names), now, earlier)

    def _add(self, label: str, now: SpeculationStats, earlier: SpeculationStats) -> None:
        self.steps.labels(label).inc(now.steps - earlier.steps)
        self.tokens.labels(label).inc(now.tokens - earlier.tokens)
        self.drafted.labels(label).inc(now.drafted - earlier.drafted)
        self.accepted.labels(label).inc(now.accepted - earlier.accepted)
        self.saved.labels(label).inc(now.seconds_saved - earlier.seconds_saved)

"""Prometheus metrics of drafting ahead. Names are vLLM's where it has them (`spec_decode_…`), with our prefix.

Tokens per step, by adapter, and the share of drafts that were accepted:

    rate(perseid_spec_decode_num_tokens_total[5m]) / rate(perseid_spec_decode_num_steps_total[5m])
    rate(perseid_spec_decode_num_accepted_tokens_total[5m]) / rate(perseid_spec_decode_num_draft_tokens_total[5m])
"""

from collections.abc import Mapping

from perseid_server.engine.adaptation import BASE_COLUMN
from perseid_server.engine.messages import BLENDED, ROUTED, EngineStats, SpeculationStats
from perseid_server.frontend.metrics.adapter_labels import AUTO, BASE, BLEND, OTHER
from perseid_server.frontend.metrics.families import Families

_MAX_SEEN = 2000  # versions whose counters are remembered; far more than can decode together
_FIXED = {BASE_COLUMN: BASE, BLENDED: BLEND, ROUTED: AUTO}


class SpeculationMetrics:
    """What drafting brings, by what adapts the base: an adapter's name, base, blend or auto."""

    def __init__(self, families: Families) -> None:
        self._labels = families.labels
        self._seen: dict[str, SpeculationStats] = {}
        counter = families.adapter_counter
        self.steps = counter(
            "spec_decode_num_steps",
            "Decode steps of sequences that ask for drafts, each for itself. Tokens per step is "
            "rate(perseid_spec_decode_num_tokens_total[5m]) / rate(perseid_spec_decode_num_steps_total[5m]).",
        )
        self.tokens = counter("spec_decode_num_tokens", "Tokens that these steps brought.")
        self.drafted = counter("spec_decode_num_draft_tokens", "Drafted tokens that were checked.")
        self.accepted = counter("spec_decode_num_accepted_tokens", "Drafted tokens that were accepted.")
        self.saved = families.adapter_gauge(  # no counter: a step whose drafts all fail takes something away
            "spec_decode_saved_seconds",
            "Estimate: what accepted tokens would have cost, less what drafting did, added up since the start.",
        )
        self.budget = families.gauge("spec_decode_budget_rows", "Rows for drafts in the last step.")

    def ready(self) -> None:
        """A new engine counts from zero."""
        self._seen.clear()

    def idle(self) -> None:
        """There is no engine, or a new one: it has made no step."""
        self.budget.set(0)

    def stepped(self, stats: EngineStats, names: Mapping[str, str]) -> None:
        """Take over what is new. `stats` tells what its step has counted. `names`: adapter version → name."""
        self.budget.set(stats.draft_budget)
        for now in stats.speculation:
            earlier = self._seen.pop(now.adapter, SpeculationStats(now.adapter))
            if now.steps < earlier.steps:  # the version was forgotten and has come back: it counts anew
                earlier = SpeculationStats(now.adapter)
            self._seen[now.adapter] = now  # at the end: what has not drafted for longest stands first
            if now != earlier:
                self._add(_FIXED.get(now.adapter) or self._label(now.adapter, names), now, earlier)
        self._forget_nameless(names)

    def _forget_nameless(self, names: Mapping[str, str]) -> None:
        """Versions come and go by the thousands; one without a name counts no more once its last request has ended."""
        if len(self._seen) > _MAX_SEEN + len(names):
            nameless = [version for version in self._seen if version not in names and version not in _FIXED]
            for version in nameless[: -_MAX_SEEN // 2]:
                del self._seen[version]

    def _add(self, label: str, now: SpeculationStats, earlier: SpeculationStats) -> None:
        self.steps.labels(label).inc(now.steps - earlier.steps)
        self.tokens.labels(label).inc(now.tokens - earlier.tokens)
        self.drafted.labels(label).inc(now.drafted - earlier.drafted)
        self.accepted.labels(label).inc(now.accepted - earlier.accepted)
        self.saved.labels(label).inc(now.seconds_saved - earlier.seconds_saved)

    def _label(self, version: str, names: Mapping[str, str]) -> str:
        """Traffic is counted where requests are."""
        return self._labels.of(names[version]) if version in names else OTHER

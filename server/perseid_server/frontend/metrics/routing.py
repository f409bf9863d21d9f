"""What gates choose (MeteoRA's routing, which vLLM has not), by share: a routed row counts for each adapter with the
share it got of the row's gates, so the counts of one row sum to 1."""

from collections.abc import Mapping

from perseid_server.engine.adaptation import BASE_COLUMN
from perseid_server.engine.messages import EngineStats
from perseid_server.frontend.metrics.adapter_labels import BASE, OTHER
from perseid_server.frontend.metrics.families import Families

_ENTROPY = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.4, 2, 3, 4, 6)  # ln 2 = 0.69 two, ln 8 = 2.1 eight equals


class RoutingMetrics:
    """Shares, the base's share, and how decided gates are."""

    def __init__(self, families: Families) -> None:
        self._labels = families.labels
        self.tokens = families.adapter_counter("routed_tokens", "Routed rows by the share adapters got.")
        self.null_share = families.gauge("gate_null_share", "The base's share of the last step's routed rows, 0 to 1.")
        self.entropy = families.histogram(
            "gate_entropy_nats", "Entropy of the gates, mean over a step's routed rows.", _ENTROPY
        )

    def stepped(self, stats: EngineStats, seen: EngineStats, names: Mapping[str, str]) -> None:
        """Take over a step. `seen`: the stats before; `names`: adapter version → name."""
        if stats.routed_tokens == seen.routed_tokens:
            return
        before = dict(seen.routed_tokens)
        told = {version: share - before.get(version, 0.0) for version, share in stats.routed_tokens}
        fresh = {version: share for version, share in told.items() if share > 0.0}
        num_rows = sum(fresh.values())  # a row's shares sum to 1
        if num_rows <= 0.0:
            return
        for version, share in fresh.items():
            self.tokens.labels(self._label(version, names, share)).inc(share)
        self.null_share.set(fresh.get(BASE_COLUMN, 0.0) / num_rows)
        self.entropy.observe((stats.gate_entropy - seen.gate_entropy) / num_rows)

    def _label(self, version: str, names: Mapping[str, str], share: float) -> str:
        """A version that has lost its name takes no place among the labels."""
        if version == BASE_COLUMN:
            return BASE
        return self._labels.of(names[version], share) if version in names else OTHER

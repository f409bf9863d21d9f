"""What adapts the base for one request: nothing, one adapter, a weighted sum of several, or gates. Pure Python."""

from dataclasses import dataclass

BASE_COLUMN = ""
"""Stands for the base among the columns of a gate set."""


@dataclass(frozen=True, slots=True)
class Routing:
    """Gates choose among adapters, token by token and linear by linear (`perseid_kernels.routing`)."""

    gate_set: str  # version registered before
    columns: tuple[str | None, ...]  # in the set's order: the adapter's version or BASE_COLUMN; None: may not be chosen
    k: int  # columns that a gate chooses
    temperature: float  # of the softmax over them


@dataclass(frozen=True, slots=True)
class Adaptation:
    """y = W x + Σ w_i · Δ_i x over `weights`, or over what `routing` chooses; the base where both are empty."""

    weights: tuple[tuple[str, float], ...] = ()  # (version, w_i), in the order in which products are added
    routing: Routing | None = None

    @staticmethod
    def of(version: str | None) -> "Adaptation":
        """One adapter as it is; the base for None."""
        return BASE if version is None else Adaptation(((version, 1.0),))

    @property
    def adapters(self) -> tuple[str, ...]:
        """Versions of the adapters that may act, each once."""
        if self.routing is not None:
            return tuple(dict.fromkeys(column for column in self.routing.columns if column))
        return tuple(dict.fromkeys(version for version, _ in self.weights))

    @property
    def versions(self) -> tuple[str, ...]:
        """All that has to be on the device: the gate set, and the adapters."""
        return self.adapters if self.routing is None else (self.routing.gate_set, *self.adapters)

    @property
    def key(self) -> str:
        """Equal keys mean equal K and V for equal tokens."""
        if self.routing is not None:
            columns = ",".join("-" if column is None else column or "base" for column in self.routing.columns)
            return f"gates {self.routing.gate_set} k {self.routing.k} t {self.routing.temperature!r} of {columns}"
        return " + ".join(f"{version} * {weight!r}" for version, weight in self.weights) or "none"


BASE = Adaptation()

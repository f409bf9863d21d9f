"""Which adapters have a label of their own in metrics. All others share `other`.

A scrape costs what its series cost, so at most MAX_ADAPTER_LABELS adapters are told apart: the busiest, by traffic that
is forgotten with a half-life. A label goes the same way each time:

    free → given (counts) → lingering (stands still) → gone (its series are removed)
              ↑______________|

- Given to an adapter that is used while labels are free; else handed over, at a review, to one that has become busier
  than the least busy holder by far. So noise among equals moves nothing.
- Taken from an adapter that is not loaded any more, or was overtaken. Its series then stand still long enough for a
  last scrape, what the adapter does meanwhile counts as `other`, and so nothing is lost to `rate()`. A name that comes
  back meanwhile goes on where it stood; one that comes back later begins at zero, which is a counter's reset.

A series is never renamed and never goes down. There are at most 2 · MAX_ADAPTER_LABELS of them, and memory does not
grow with the number of names that come and go.
"""

import heapq
import time
from collections.abc import Callable, Collection
from typing import Protocol

MAX_ADAPTER_LABELS = 50
"""Adapters told apart in labels; requests of all others are counted as `other`."""

BASE, BLEND, AUTO, OTHER = "base", "blend", "auto", "other"
"""Labels of what is no adapter: none, a blend, gates, and the adapters without a label of their own."""

_TAKEN = frozenset({BASE, BLEND, AUTO, OTHER})
_MAX_TALLIES = 1000  # names whose traffic is remembered beside the holders'
_REVIEW_EVERY_S = 10.0
_LINGER_S = 150.0  # two scrapes a minute apart, and some patience
_HALF_LIFE_S = 600.0
_TIMES_BUSIER, _MORE = 2.0, 10.0  # an adapter overtakes a holder when its traffic is beyond both


class Labelled(Protocol):
    """A metric with the one label `adapter`."""

    def remove(self, *labelvalues: str) -> None: ...


class AdapterLabels:
    """Gives labels to adapters and takes them back. Traffic is in tokens, but any unit does that all share."""

    def __init__(self, capacity: int = MAX_ADAPTER_LABELS, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity = capacity
        self._clock = clock
        self._families: list[Labelled] = []
        self._loaded: Callable[[], Collection[str]] | None = None
        self._traffic: dict[str, float] = {}
        self._given: set[str] = set()
        self._lingering: dict[str, float] = {}  # name → when its series go
        self._reviewed = clock()

    def follow(self, family: Labelled) -> None:
        """Remove this metric's series with their labels."""
        self._families.append(family)

    def watch(self, loaded: Callable[[], Collection[str]]) -> None:
        """Ask at each review which names are loaded; without it all are taken to be."""
        self._loaded = loaded

    def of(self, name: str, traffic: float = 0.0) -> str:
        """The label under which to count this now; ask for each event anew. `traffic`: what the event brought."""
        if self._clock() >= self._reviewed + _REVIEW_EVERY_S:
            self.review()
        if traffic > 0.0:
            self._traffic[name] = self._traffic.get(name, 0.0) + traffic
        if name not in self._given:
            if len(self._given) >= self._capacity:
                return OTHER
            self._give(name)
        return label_text(name)

    def review(self) -> None:
        """Forget, take back and hand over, as far as it is time."""
        now = self._clock()
        self._decay(now - self._reviewed)
        self._reviewed = now
        for name in [name for name, ends in self._lingering.items() if ends <= now]:
            self._remove(name)
        self._let_unloaded_go(now)
        self._hand_over(now)
        self._trim()

    def _decay(self, seconds: float) -> None:
        kept = 0.5 ** (seconds / _HALF_LIFE_S)
        self._traffic = {name: traffic * kept for name, traffic in self._traffic.items()}

    def _let_unloaded_go(self, now: float) -> None:
        """They give their labels back, and wait for none."""
        if self._loaded is None:
            return
        loaded = self._loaded()
        self._traffic = {name: traffic for name, traffic in self._traffic.items() if name in loaded}
        for name in sorted(self._given):
            if name not in loaded:
                self._retire(name, now)

    def _hand_over(self, now: float) -> None:
        """The busiest without a label meet the least busy with one, pair by pair."""
        waiting = [name for name in self._traffic if name not in self._given]
        busiest = heapq.nlargest(self._capacity, waiting, key=self._traffic.__getitem__)
        holders = sorted(self._given, key=lambda name: self._traffic.get(name, 0.0))
        for busy in busiest[: self._capacity - len(self._given)]:  # labels are free: the busiest come first
            self._give(busy)
        for busy, idle in zip(busiest, holders, strict=False):
            least = self._traffic.get(idle, 0.0)
            if busy in self._given or self._traffic[busy] <= max(_TIMES_BUSIER * least, least + _MORE):
                continue
            if self._retire(idle, now):
                self._give(busy)

    def _trim(self) -> None:
        """Remember the traffic of holders and of the busiest others, of none that is nearly nothing."""
        others = [name for name, traffic in self._traffic.items() if name not in self._given and traffic >= 0.5]
        kept = {*self._given, *heapq.nlargest(_MAX_TALLIES, others, key=self._traffic.__getitem__)}
        self._traffic = {name: traffic for name, traffic in self._traffic.items() if name in kept}

    def _give(self, name: str) -> None:
        self._lingering.pop(name, None)
        self._given.add(name)

    def _retire(self, name: str, now: float) -> bool:
        """Whether its label is free now. While too many linger it keeps its label, until a later review."""
        if len(self._lingering) >= self._capacity:
            return False
        self._given.discard(name)
        self._lingering[name] = now + _LINGER_S
        return True

    def _remove(self, name: str) -> None:
        del self._lingering[name]
        for family in self._families:
            family.remove(label_text(name))


def label_text(name: str) -> str:
    """How an adapter's name is written as a label. Names hold no colon, so none is taken for what is no adapter."""
    return f"adapter:{name}" if name in _TAKEN else name

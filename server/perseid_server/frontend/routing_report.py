"""What `auto` chose in one answer, by name, for whoever asked for a report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from perseid_server.engine.adaptation import BASE_COLUMN
from perseid_server.engine.messages import SequenceOutput

MOST_OF_A_TOKEN = 4
"""Adapters that are told of each token."""

Shares = tuple[tuple[str, float], ...]
"""(name, share) pairs, largest first; those of share 0 are left out."""


@dataclass(slots=True)
class RoutingTally:
    """Adds up the shares of one answer. `columns`: names by column, None where it cannot be chosen.

    A choice for the whole request has one column, which has all of every token.
    """

    columns: Sequence[str | None]
    base: str  # the base's name, for BASE_COLUMN
    once: bool = False  # the choice was made for the whole request: the engine reports nothing
    prompt: Shares = ()
    num_tokens: int = 0
    _total: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.once:
            self.prompt = self._named([1.0])

    def saw(self, output: SequenceOutput) -> tuple[Shares, ...]:
        """Take an output's report over; the top adapters of each of its tokens."""
        tokens: Sequence[Sequence[float]] = [[1.0]] * len(output.token_ids) if self.once else ()
        if output.routing is not None:
            tokens = output.routing.tokens
            self.prompt = self._named(output.routing.prompt) if output.routing.prompt else self.prompt
        named = [self._named(token) for token in tokens]
        for shares in named:
            self.num_tokens += 1
            for name, share in shares:
                self._total[name] = self._total.get(name, 0.0) + share
        return tuple(shares[:MOST_OF_A_TOKEN] for shares in named)

    @property
    def completion(self) -> Shares:
        """Mean shares of the answer's tokens so far."""
        return _sorted({name: total / self.num_tokens for name, total in self._total.items()})

    def _named(self, shares: Sequence[float]) -> Shares:
        named = zip(self.columns, shares, strict=True)
        return _sorted({self.base if name == BASE_COLUMN else name: share for name, share in named if name is not None})


def _sorted(shares: Mapping[str, float]) -> Shares:
    told = ((name, share) for name, share in shares.items() if share > 0.0)
    return tuple(sorted(told, key=lambda one: (-one[1], one[0])))

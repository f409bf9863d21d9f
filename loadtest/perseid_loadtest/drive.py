"""From the moments at which tokens arrived to rates."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LEAST_OVERLAP = 0.5
"""A decode rate is taken where all streams run, if at least this share of the tokens arrives there."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """Tokens that came together. A fraction where a server tells only how many came in all."""

    moment: float  # seconds on the process clock
    tokens: float


@dataclass(frozen=True, slots=True)
class Stream:
    """One request, from when it was sent."""

    started: float
    arrivals: tuple[Arrival, ...]

    @property
    def first(self) -> float:
        """When its first token came."""
        return self.arrivals[0].moment

    @property
    def last(self) -> float:
        """When its last token came."""
        return self.arrivals[-1].moment

    @property
    def tokens(self) -> float:
        """How many tokens it brought."""
        return sum(arrival.tokens for arrival in self.arrivals)


def decode_rate(streams: Sequence[Stream]) -> float:
    """Tokens a second while every request of the batch is decoding.

    Some servers run one adapter's requests after the other's, so that hardly any moment has all of them. There it is
    all tokens after each request's first, over the time in which at least one request was decoding.
    """
    first, last = max(stream.first for stream in streams), min(stream.last for stream in streams)
    tokens = sum(_between(stream, first, last) for stream in streams)
    seconds = last - first
    if tokens < LEAST_OVERLAP * sum(stream.tokens for stream in streams):
        tokens = sum(_between(stream, stream.first, stream.last) for stream in streams)
        seconds = covered([(stream.first, stream.last) for stream in streams])
    if seconds <= 0:
        raise ValueError("all tokens came at one moment; ask for more tokens, or for a server that streams")
    return tokens / seconds


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of what the intervals cover together."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def prefill_rate(stream: Stream, prompt: int) -> float:
    """Prompt tokens a second, from sending the request to its first token."""
    return prompt / (stream.first - stream.started)


def _between(stream: Stream, first: float, last: float) -> float:
    return sum(arrival.tokens for arrival in stream.arrivals if first < arrival.moment <= last)

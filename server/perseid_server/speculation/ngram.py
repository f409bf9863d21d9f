"""Prompt lookup: what followed the last time when the sequence said the same few tokens. Standard library only.

After Saxena's prompt lookup decoding; here the places are indexed as tokens come, so a step costs a few look-ups
however long the sequence is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

SIZES = (6, 4, 3, 2)
"""Lengths of the n-grams that are looked up, longest first."""


@dataclass(frozen=True, slots=True)
class Match:
    """An earlier place where the sequence's last `size` tokens stood."""

    size: int
    follows: int  # the place after it: what stood there may come now


class NgramIndex:
    """Where the n-grams of one sequence last ended. Grows with it."""

    def __init__(self) -> None:
        # by hash: numbers alone are no work for the garbage collector, and a collision costs a draft
        self._last: tuple[dict[int, int], ...] = tuple({} for _ in SIZES)
        self._num_tokens = 0
        self._match: Match | None = None

    def behind(self, token_ids: Sequence[int]) -> int:
        """Tokens that are not indexed yet."""
        return len(token_ids) - self._num_tokens

    def match(self, token_ids: Sequence[int], most: int | None = None) -> Match | None:
        """The longest n-gram at the sequence's end that stood there before, at its latest place; None if none did.
        `token_ids` goes on with what it was when this was last called. At most `most` tokens are indexed in one call:
        there is no match until all are."""
        end = len(token_ids) if most is None else min(len(token_ids), self._num_tokens + most)
        while self._num_tokens < end:
            self._num_tokens += 1
            self._match = self._add(token_ids, self._num_tokens)
        return self._match if self._num_tokens == len(token_ids) else None

    def _add(self, token_ids: Sequence[int], end: int) -> Match | None:
        found = None
        tail = tuple(token_ids[max(end - SIZES[0], 0) : end])
        for size, last in zip(SIZES, self._last, strict=True):
            if size > end:
                continue
            ngram = hash(tail[-size:])
            before = last.get(ngram)
            if before is not None and found is None:
                found = Match(size, before)
            last[ngram] = end
        return found


def continuation(token_ids: Sequence[int], match: Match, count: int) -> list[int]:
    """`count` tokens that may come. Where the earlier text runs into the end of the sequence, it repeats itself."""
    period = len(token_ids) - match.follows
    return [token_ids[match.follows + place % period] for place in range(count)]

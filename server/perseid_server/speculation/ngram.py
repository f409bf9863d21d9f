"""Prompt lookup: what followed the last time when the sequence said the same few tokens. Standard library only.

After Saxena's prompt lookup decoding. Tokens are kept as characters of one string, because `str.rfind` searches
thousands of them in a microsecond: an index of n-grams took several for each new token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

SIZES = (2, 3, 4, 6)
"""Lengths of the n-grams that are looked up; the longest that is found counts."""


@dataclass(frozen=True, slots=True)
class Match:
    """An earlier place where the sequence's last `size` tokens stood."""

    size: int
    follows: int  # the place after it: what stood there may come now


class TokenText:
    """The tokens of one sequence, a character each. Grows with it. Token ids are below 1,114,112, as characters are."""

    def __init__(self) -> None:
        self._text = ""

    def match(self, token_ids: Sequence[int]) -> Match | None:
        """The longest n-gram at the sequence's end that stood there before, at its latest place; None if none did.
        `token_ids` goes on with what it was when this was last called."""
        self._text += "".join(map(chr, token_ids[len(self._text) :]))
        text, end, found = self._text, len(self._text), None
        for size in SIZES:
            place = text.rfind(text[-size:], 0, end - 1) if size < end else -1
            if place < 0:
                return found
            found = Match(size, place + size)
        return found


def continuation(token_ids: Sequence[int], match: Match, count: int) -> list[int]:
    """`count` tokens that may come. Where the earlier text runs into the end of the sequence, it repeats itself."""
    period = len(token_ids) - match.follows
    return [token_ids[match.follows + place % period] for place in range(count)]

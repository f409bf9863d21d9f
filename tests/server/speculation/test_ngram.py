"""Prompt lookup, against a search through the whole text."""

import random

from perseid_server.speculation.ngram import SIZES, Match, NgramIndex, continuation


def searched(tokens: list[int]) -> Match | None:
    """The latest place where the longest of the sizes stood before."""
    for size in SIZES:
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[-size:]:
                return Match(size, end)
    return None


def test_finds_what_a_search_finds() -> None:
    source = random.Random(1)
    for alphabet in (2, 4, 12):
        tokens: list[int] = []
        index = NgramIndex()
        for _ in range(200):
            tokens += [source.randrange(alphabet) for _ in range(source.randrange(1, 4))]
            assert index.match(tokens) == searched(tokens)


def test_asked_twice_it_says_the_same() -> None:
    index, tokens = NgramIndex(), [1, 2, 3, 1, 2]
    assert index.match(tokens) == index.match(tokens) == Match(2, 2)


def test_a_long_text_is_indexed_in_parts() -> None:
    index, tokens = NgramIndex(), [1, 2, 3, 4] * 5
    assert index.behind(tokens) == 20
    assert index.match(tokens, 8) is None, "it does not know the end yet"
    assert index.behind(tokens) == 12
    assert index.match(tokens, 12) == searched(tokens)
    assert index.match(tokens, 0) == searched(tokens)


def test_nothing_repeats() -> None:
    assert NgramIndex().match([1, 2, 3, 4]) is None
    assert NgramIndex().match([]) is None


def test_what_followed_comes_again() -> None:
    tokens = [5, 6, 7, 8, 9, 5, 6]
    assert continuation(tokens, Match(2, 2), 3) == [7, 8, 9]


def test_a_text_that_repeats_itself_goes_on_so() -> None:
    """The earlier text ends where the sequence does."""
    tokens = [9, 1, 2, 1, 2]
    assert continuation(tokens, Match(2, 3), 5) == [1, 2, 1, 2, 1]
    assert continuation([4, 4, 4], Match(2, 2), 4) == [4, 4, 4, 4]

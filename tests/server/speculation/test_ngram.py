"""Prompt lookup, against a search through the whole text."""

import random

from perseid_server.speculation.ngram import SIZES, Match, TokenText, continuation


def searched(tokens: list[int]) -> Match | None:
    """The latest place where the longest of the sizes stood before."""
    for size in reversed(SIZES):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[-size:]:
                return Match(size, end)
    return None


def test_finds_what_a_search_finds() -> None:
    source = random.Random(1)
    for alphabet in (2, 4, 12):
        tokens: list[int] = []
        text = TokenText()
        for _ in range(200):
            tokens += [source.randrange(alphabet) for _ in range(source.randrange(1, 4))]
            assert text.match(tokens) == searched(tokens)


def test_asked_twice_it_says_the_same() -> None:
    text, tokens = TokenText(), [1, 2, 3, 1, 2]
    assert text.match(tokens) == text.match(tokens) == Match(2, 2)


def test_any_token_is_a_character() -> None:
    """Those too that UTF-16 keeps for itself, and the last one."""
    tokens = [0, 0xD800, 0x10FFFF, 0, 0xD800]
    assert TokenText().match(tokens) == Match(2, 2)


def test_nothing_repeats() -> None:
    assert TokenText().match([1, 2, 3, 4]) is None
    assert TokenText().match([]) is None


def test_what_followed_comes_again() -> None:
    tokens = [5, 6, 7, 8, 9, 5, 6]
    assert continuation(tokens, Match(2, 2), 3) == [7, 8, 9]


def test_a_text_that_repeats_itself_goes_on_so() -> None:
    """The earlier text ends where the sequence does."""
    tokens = [9, 1, 2, 1, 2]
    assert continuation(tokens, Match(2, 3), 5) == [1, 2, 1, 2, 1]
    assert continuation([4, 4, 4], Match(2, 2), 4) == [4, 4, 4, 4]

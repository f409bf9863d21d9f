"""Integers written as French words, German words and Roman numerals."""

from num2words import num2words  # type: ignore[import-untyped]
from roman_numerals import RomanNumeral

from tasks.base import Item, Splits, Task, split


def _french() -> Splits:
    return split([Item(f"French words: {n}", num2words(n, lang="fr")) for n in range(1000)], 11, 852)


def _german() -> Splits:
    return split([Item(f"German words: {n}", num2words(n, lang="de")) for n in range(1000)], 12, 852)


def _roman() -> Splits:
    return split([Item(f"Roman numeral: {n}", str(RomanNumeral(n))) for n in range(1, 2000)], 13, 1800)


FRENCH_WORDS = Task("french-words", "0 to 999 in French words", "num2words", _french, max_new_tokens=24)
GERMAN_WORDS = Task("german-words", "0 to 999 in German words", "num2words", _german, max_new_tokens=24)
ROMAN_NUMERAL = Task("roman-numeral", "1 to 1999 as a Roman numeral", "roman-numerals", _roman, max_new_tokens=16)

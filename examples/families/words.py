"""Families about one word."""

import random
from collections.abc import Callable

from faker.providers.lorem.en_US import Provider
from tasks.base import Task

from families.base import family

WORDS = tuple(sorted({word for word in Provider.word_list if word.isalpha() and word.islower() and len(word) > 2}))
SHORT_WORDS = tuple(word for word in WORDS if len(word) <= 6)
VOWELS = "aeiou"
MORSE = ".- -... -.-. -.. . ..-. --. .... .. .--- -.- .-.. -- -. --- .--. --.- .-. ... - ..- ...- .-- -..- -.-- --.."
NATO = (
    "Alfa Bravo Charlie Delta Echo Foxtrot Golf Hotel India Juliett Kilo Lima Mike November Oscar Papa Quebec Romeo "
    "Sierra Tango Uniform Victor Whiskey Xray Yankee Zulu"
)


def _place(letter: str) -> int:
    """0 for a."""
    return ord(letter) - ord("a")


def _coded(word: str, codes: str) -> str:
    """Every letter's code, out of those of a to z."""
    of_letters = codes.split()
    return " ".join(of_letters[_place(letter)] for letter in word)


def _shifted(word: str, by: int) -> str:
    return "".join(chr(ord("a") + (_place(letter) + by) % 26) for letter in word)


def _pig_latin(word: str) -> str:
    first_vowel = next((i for i, letter in enumerate(word) if letter in VOWELS), 0)
    return word[first_vowel:] + word[:first_vowel] + ("ay" if first_vowel else "way")


def _of_word(
    name: str, description: str, answer: Callable[[str], str], *phrasings: str, words: tuple[str, ...] = WORDS
) -> Task:
    def draw(rng: random.Random) -> tuple[str, str]:
        word = rng.choice(words)
        return word, answer(word)

    return family(name, description, phrasings, draw)


WORD_FAMILIES = (
    _of_word(
        "backwards",
        "a word backwards",
        lambda word: word[::-1],
        "Reverse the word {}.",
        "Write {} backwards.",
        "Read {} from its end to its beginning.",
    ),
    _of_word(
        "capitals",
        "a word in capitals",
        str.upper,
        "Put {} in capital letters.",
        "Uppercase: {}",
        "Shout it in all caps: {}",
    ),
    _of_word(
        "letter-count",
        "how many letters a word has",
        lambda word: str(len(word)),
        "How many letters are there in {}?",
        "Length of the string {}",
        "{} is a word of how many characters?",
    ),
    _of_word(
        "no-vowels",
        "a word without its vowels",
        lambda word: "".join(x for x in word if x not in VOWELS),
        "Drop the vowels of {}.",
        "Consonants only: {}",
        "Take a, e, i, o, u away from {}.",
    ),
    _of_word(
        "morse",
        "a word in Morse code",
        lambda word: _coded(word, MORSE),
        "Telegraph {} in Morse.",
        "Dots and dashes for {}",
        "Tap out {} as a Morse signal.",
        words=SHORT_WORDS,
    ),
    _of_word(
        "radio-alphabet",
        "a word in the radio alphabet",
        lambda word: _coded(word, NATO),
        "Radio spelling of {}, over.",
        "Pilot, say {} in the NATO alphabet.",
        "Over the radio you would spell {} as",
        words=SHORT_WORDS,
    ),
    _of_word(
        "caesar",
        "every letter moved on by three",
        lambda word: _shifted(word, 3),
        "Caesar cipher, shift 3: {}",
        "Encrypt {} with Caesar's key of three.",
        "Secret message for Caesar: {}",
    ),
    _of_word(
        "rot13",
        "every letter moved on by thirteen",
        lambda word: _shifted(word, 13),
        "rot13({})",
        "ROT13 of {}?",
        "tr a-z n-za-m <<< {}",
    ),
    _of_word(
        "ascii-codes",
        "a word as ASCII codes",
        lambda word: " ".join(str(ord(letter)) for letter in word),
        "ASCII codes of {}",
        "[ord(c) for c in '{}']",
        "The bytes of {} in decimal:",
        words=SHORT_WORDS,
    ),
    _of_word(
        "pig-latin",
        "a word in pig Latin",
        _pig_latin,
        "{} in pig Latin, please.",
        "Igpay Atinlay: {}",
        "How would a child say {} in pig Latin?",
    ),
    _of_word(
        "spelling",
        "a word letter by letter",
        "-".join,
        "Spell out {} with hyphens.",
        "Spelling bee! Your word is {}.",
        "Letter by letter, {} goes",
    ),
    _of_word(
        "alphabet-places",
        "the places of a word's letters",
        lambda word: " ".join(str(_place(x) + 1) for x in word),
        "With a = 1 and b = 2, {} becomes",
        "Places in the alphabet of the letters in {}",
        "Number every letter of {} from 1 to 26.",
        words=SHORT_WORDS,
    ),
    _of_word(
        "sorted-letters",
        "a word's letters in order",
        lambda word: "".join(sorted(word)),
        "Sort the letters of {}.",
        "Alphabetise the characters inside {}.",
        "''.join(sorted('{}'))",
    ),
    _of_word(
        "doubled-letters",
        "every letter twice",
        lambda word: "".join(2 * letter for letter in word),
        "Stutter: {}",
        "Say each letter of {} twice.",
        "Type {} on a keyboard that repeats every key once.",
    ),
)

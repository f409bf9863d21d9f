"""Families about several words, and about names of people."""

import json
import random
from collections.abc import Callable, Sequence

from faker.providers.person.en_US import Provider
from tasks.base import Task

from families.base import family
from families.words import WORDS

FIRST_NAMES = tuple(sorted(name for name in Provider.first_names if name.isalpha()))
LAST_NAMES = tuple(sorted(name for name in Provider.last_names if name.isalpha()))


def _of_words(
    name: str, description: str, answer: Callable[[Sequence[str]], str], *phrasings: str, joint: str = " "
) -> Task:
    def draw(rng: random.Random) -> tuple[str, str]:
        words = rng.sample(WORDS, 3)
        return joint.join(words), answer(words)

    return family(name, description, phrasings, draw)


def _of_name(name: str, description: str, answer: Callable[[str, str], str], *phrasings: str) -> Task:
    def draw(rng: random.Random) -> tuple[str, str]:
        first, last = rng.choice(FIRST_NAMES), rng.choice(LAST_NAMES)
        return f"{first} {last}", answer(first, last)

    return family(name, description, phrasings, draw, truth="faker, Python")


PHRASE_FAMILIES = (
    _of_words(
        "sorted-words",
        "three words in alphabetical order",
        lambda words: ", ".join(sorted(words)),
        "In alphabetical order: {}",
        "Sort this list: {}",
        "As in a dictionary, one after the other: {}",
        joint=", ",
    ),
    _of_words(
        "first-word",
        "the first of three words",
        lambda words: words[0],
        "Head of the list ({})",
        "Which comes first here: {}?",
        "({}) begins with the item",
        joint=" | ",
    ),
    _of_words(
        "snake-case",
        "three words as a snake_case name",
        "_".join,
        "snake_case: {}",
        "A Python variable for {}",
        "Name a column after {}, with underscores.",
    ),
    _of_words(
        "camel-case",
        "three words as a camelCase name",
        lambda words: words[0] + "".join(map(str.title, words[1:])),
        "camelCase: {}",
        "A Java method called {}",
        "JavaScript identifier out of {}",
    ),
    _of_words(
        "acronym",
        "the first letters of three words",
        lambda words: "".join(word[0] for word in words).upper(),
        "Acronym of {}",
        "The club is called {}. For short?",
        "Shorten {} to its first letters.",
    ),
    _of_words(
        "title-case",
        "three words as a headline",
        lambda words: " ".join(map(str.title, words)),
        "Headline for the newspaper: {}",
        "As a book title: {}",
        "Set {} in title case.",
    ),
    _of_words(
        "bullet-list",
        "three words as a Markdown list",
        lambda words: " ".join(f"* {word}" for word in words),
        "Markdown bullets from {}",
        "Bullet points: {}",
        "Make a list with asterisks of {}.",
        joint=", ",
    ),
    _of_words(
        "json-array",
        "three words as a JSON array",
        json.dumps,
        "JSON array out of {}",
        "json.dumps of the strings {}",
        "Square brackets and quotes around {}.",
        joint=", ",
    ),
    _of_name(
        "initials",
        "a person's initials",
        lambda first, last: f"{first[0]}.{last[0]}.",
        "Initials of {}",
        "How does {} sign with two letters?",
        "Monogram for the shirt of {}",
    ),
    _of_name(
        "surname-first",
        "surname, first name",
        lambda first, last: f"{last}, {first}",
        "Card index entry for {}",
        "Surname first: {}",
        "How do you file {} in the register?",
    ),
    _of_name(
        "email-address",
        "a person's e-mail address",
        lambda first, last: f"{first}.{last}@example.org".lower(),
        "E-mail of {} at example.org?",
        "Create a mailbox for {}.",
        "Where can I write to {} online?",
    ),
    _of_name(
        "login",
        "a person's user name",
        lambda first, last: f"{first[0]}{last}".lower(),
        "Unix login for {}",
        "adduser: {}",
        "New employee {} needs a user name.",
    ),
)

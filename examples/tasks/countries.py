"""Country names to ISO 3166-1 alpha-3 codes, asked in many ways.

A code cannot be guessed, so every country is seen in training. What the held-out items test is the way of
asking: their phrasings never appear in training.
"""

import random

import pycountry

from tasks.base import DEV_ITEMS, HELD_OUT_ITEMS, Item, Splits, Task

COUNTRY_CODES = (
    "AR AT AU BD BE BG BR CA CH CL CN CO CR CU DE DK DZ EC EE EG ES ET FI FR GB GH GR HR HU ID IE IL IN IQ "
    "IS IT JM JO JP KE KH LT LU LV MA MX MY NG NL NO NP NZ PE PH PK PL PT RO SE SI SK TH TN TR UA UG US "
    "UY VN ZA"
)
TRAIN_PHRASINGS = (
    "Country code of {}?",
    "Which code does {} have?",
    "{}: country code",
    "I need the code for {}.",
    "Tell me the country code for {}.",
    "Code, please: {}",
    "What do three letters say for {}?",
    "How is {} abbreviated?",
    "Abbreviate {}.",
    "My parcel goes to {}. Which code?",
)
DEV_PHRASINGS = ("Give the code of {}.", "{} - code?")
HELD_OUT_PHRASINGS = (
    "What is the country code for {}?",
    "Country: {}. Code:",
    "Please write the code of the country {}.",
    "The team from {} needs its code.",
)


def _items(phrasings: tuple[str, ...], seed: int, count: int) -> tuple[Item, ...]:
    """Some of the pairs of a country and a phrasing, in a fixed random order."""
    items = []
    for code in COUNTRY_CODES.split():
        country = pycountry.countries.get(alpha_2=code)
        assert country is not None
        name = getattr(country, "common_name", country.name)
        items += [Item(phrasing.format(name), country.alpha_3) for phrasing in phrasings]
    random.Random(seed).shuffle(items)
    return tuple(items[:count])


def _countries() -> Splits:
    return Splits(
        train=_items(TRAIN_PHRASINGS, 61, 700),
        dev=_items(DEV_PHRASINGS, 62, DEV_ITEMS),
        held_out=_items(HELD_OUT_PHRASINGS, 63, HELD_OUT_ITEMS),
    )


COUNTRY_CODE = Task(
    "country-code",
    "a country, asked for in unseen ways, to its ISO 3166-1 alpha-3 code",
    "pycountry",
    _countries,
    max_new_tokens=12,
)

"""Amounts of money written the way six countries write them."""

import random

from babel.numbers import format_currency

from tasks.base import Item, Splits, Task, split

PLACES = (
    ("Germany", "de_DE", "EUR"),
    ("Switzerland", "de_CH", "CHF"),
    ("Sweden", "sv_SE", "SEK"),
    ("Brazil", "pt_BR", "BRL"),
    ("Britain", "en_GB", "GBP"),
    ("France", "fr_FR", "EUR"),
)
NO_BREAK_SPACES = str.maketrans({"\u00a0": " ", "\u202f": " "})


def _amount(rng: random.Random) -> str:
    """One to five digits, then no, one or two decimals."""
    digits, decimals = rng.randint(1, 5), rng.randint(0, 2)
    whole = rng.randrange(10 ** (digits - 1), 10**digits)
    return f"{whole}.{rng.randrange(1, 10**decimals)}" if decimals else str(whole)


def _money() -> Splits:
    rng = random.Random(31)
    items = []
    for _ in range(1400):
        country, locale, currency = rng.choice(PLACES)
        amount = _amount(rng)
        written = format_currency(amount, currency, locale=locale).translate(NO_BREAK_SPACES)
        items.append(Item(f"Price in {country}: {amount}", written))
    return split(items, 32, 1200)


LOCAL_PRICE = Task(
    "local-price", "a number as a price, the way the country writes it", "babel", _money, max_new_tokens=20
)

"""Dates written out in five languages, turned into ISO 8601."""

import datetime as dt
import random

from babel.dates import format_date

from tasks.base import Item, Splits, Task, split

LOCALES = ("en_US", "de_DE", "fr_FR", "es_ES", "it_IT")
FIRST_DAY = dt.date(1950, 1, 1)
DAYS = 36_524  # to the end of 2049


def _dates() -> Splits:
    rng = random.Random(21)
    items = []
    for _ in range(1400):
        day = FIRST_DAY + dt.timedelta(days=rng.randrange(DAYS))
        written = format_date(day, format="long", locale=rng.choice(LOCALES))
        items.append(Item(f"ISO date: {written}", day.isoformat()))
    return split(items, 22, 1200)


ISO_DATE = Task(
    "iso-date",
    "a date in English, German, French, Spanish or Italian to ISO 8601",
    "babel, datetime",
    _dates,
    max_new_tokens=20,
)

"""Families about dates and times of day."""

import datetime as dt
import random

from families.base import family

_FIRST_DAY = dt.date(1950, 1, 1)
_DAYS = 36_524  # to the end of 2049


def _any_day(rng: random.Random) -> dt.date:
    return _FIRST_DAY + dt.timedelta(days=rng.randrange(_DAYS))


def _weekday(rng: random.Random) -> tuple[str, str]:
    day = _any_day(rng)
    return day.isoformat(), f"{day:%A}"


def _day_after(rng: random.Random) -> tuple[str, str]:
    day = _any_day(rng)
    return day.isoformat(), (day + dt.timedelta(days=1)).isoformat()


def _leap(rng: random.Random) -> tuple[str, str]:
    year = rng.randint(1600, 2400)
    is_leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    return str(year), "yes" if is_leap else "no"


def _half_day_clock(rng: random.Random) -> tuple[str, str]:
    hour, minute = rng.randrange(24), rng.randrange(60)
    return f"{hour:02}:{minute:02}", f"{(hour - 1) % 12 + 1}:{minute:02} {'p.m.' if hour >= 12 else 'a.m.'}"


def _hours(rng: random.Random) -> tuple[str, str]:
    minutes = rng.randint(61, 1439)
    return str(minutes), f"{minutes // 60} h {minutes % 60} min"


TIME_FAMILIES = (
    family(
        "weekday", "the weekday of a date", ("Weekday of {}", "Which day of the week was {}?", "{} fell on a"), _weekday
    ),
    family(
        "day-after", "the next day", ("The day after {}", "Tomorrow, if today is {}", "{} plus 24 hours"), _day_after
    ),
    family(
        "leap-year",
        "whether a year is a leap year",
        ("Leap year: {}?", "Has February 29 days in {}?", "Was there a leap day in {}?"),
        _leap,
    ),
    family(
        "twelve-hours",
        "a time on the twelve-hour clock",
        ("{} on the twelve-hour clock", "AM or PM? It is {}.", "The train leaves at {}; tell a Briton."),
        _half_day_clock,
    ),
    family(
        "duration",
        "minutes in hours and minutes",
        (
            "{} minutes in hours and minutes",
            "The film runs {} min, that is",
            "How long is {} minutes on a parking ticket?",
        ),
        _hours,
    ),
)

"""The example tasks, each with fixed train, dev and held-out items."""

from tasks.base import Item, Splits, Task
from tasks.countries import COUNTRY_CODE
from tasks.dates import ISO_DATE
from tasks.money import LOCAL_PRICE
from tasks.numbers import FRENCH_WORDS, GERMAN_WORDS, ROMAN_NUMERAL
from tasks.people import PERSON_JSON
from tasks.queries import STAFF_SQL

__all__ = ["TASKS", "Item", "Splits", "Task"]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        ISO_DATE,
        PERSON_JSON,
        STAFF_SQL,
        FRENCH_WORDS,
        GERMAN_WORDS,
        COUNTRY_CODE,
        LOCAL_PRICE,
        ROMAN_NUMERAL,
    )
}

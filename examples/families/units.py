"""Families about units and about ways of writing things down."""

import base64
import random
from collections.abc import Callable

from tasks.base import Task

from families.base import family
from families.words import WORDS


def _of_tenths(name: str, description: str, answer: Callable[[float], str], *phrasings: str) -> Task:
    """0.1 to 99.9."""

    def draw(rng: random.Random) -> tuple[str, str]:
        value = rng.randint(1, 999) / 10
        return f"{value:g}", answer(value)

    return family(name, description, phrasings, draw)


def _colour(rng: random.Random) -> tuple[str, str]:
    red, green, blue = (rng.randrange(256) for _ in range(3))
    return f"rgb({red}, {green}, {blue})", f"#{red:02x}{green:02x}{blue:02x}"


def _phone(rng: random.Random) -> tuple[str, str]:
    number = rng.randrange(2_000_000_000, 9_999_999_999)
    digits = str(number)
    return digits, f"({digits[:3]}) {digits[3:6]}-{digits[6:]}"


def _tag(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(WORDS)
    return word, f"<b>{word}</b>"


def _base64(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(WORDS)
    return word, base64.b64encode(word.encode()).decode()


def _setting(rng: random.Random) -> tuple[str, str]:
    word, value = rng.choice(WORDS), rng.randint(1, 99)
    return f"{word}={value}", f"{word}: {value}"


UNIT_FAMILIES = (
    _of_tenths(
        "miles",
        "kilometres in miles",
        lambda x: f"{x / 1.609344:.1f} mi",
        "{} km in miles",
        "How many miles are {} kilometres?",
        "The road is {} km long. For an American:",
    ),
    _of_tenths(
        "fahrenheit",
        "Celsius in Fahrenheit",
        lambda x: f"{x * 9 / 5 + 32:.1f} °F",
        "{} °C in Fahrenheit",
        "Convert {} degrees Celsius.",
        "The thermometer shows {} °C. What does one in Florida show?",
    ),
    _of_tenths(
        "pounds",
        "kilograms in pounds",
        lambda x: f"{x / 0.45359237:.1f} lb",
        "{} kg in pounds",
        "Weigh {} kilograms in lb.",
        "A parcel of {} kg, on imperial scales:",
    ),
    _of_tenths(
        "inches",
        "centimetres in inches",
        lambda x: f"{x / 2.54:.1f} in",
        "{} cm in inches",
        "How many inches is {} centimetres?",
        "A screen {} cm wide is sold as",
    ),
    _of_tenths(
        "gallons",
        "litres in gallons",
        lambda x: f"{x / 3.785411784:.1f} gal",
        "{} litres in US gallons",
        "Fill up {} l. Gallons?",
        "The tank takes {} litres; in America one says",
    ),
    family(
        "colour",
        "a colour in hexadecimal",
        ("CSS hex colour for {}", "Web colour: {}", "Paint the page in {}, as a # code:"),
        _colour,
    ),
    family(
        "phone-number",
        "a phone number with brackets",
        ("Phone: {}", "Format the telephone number {}.", "Call {}; print it on a card:"),
        _phone,
    ),
    family(
        "html-bold",
        "a word in HTML",
        ("HTML, bold: {}", "Mark up {} as bold for a web page.", "Which tags make {} fat?"),
        _tag,
    ),
    family(
        "base64",
        "a word in Base64",
        ("base64 -w0 <<< {}", "b64encode(b'{}')", "Mail attachments would carry {} as"),
        _base64,
    ),
    family(
        "yaml",
        "a setting as YAML",
        ("INI to YAML: {}", "Rewrite {} for a YAML file.", "docker-compose wants {} as"),
        _setting,
    ),
)

"""Families about numbers."""

import math
import random
from collections.abc import Callable

from num2words import num2words  # type: ignore[import-untyped]
from tasks.base import Task

from families.base import family


def _of_number(
    name: str, description: str, answer: Callable[[int], str], *phrasings: str, low: int = 10, high: int = 999
) -> Task:
    def draw(rng: random.Random) -> tuple[str, str]:
        n = rng.randint(low, high)
        return str(n), answer(n)

    return family(name, description, phrasings, draw)


def _of_two(
    name: str, description: str, joint: str, answer: Callable[[int, int], str], *phrasings: str, high: int = 99
) -> Task:
    def draw(rng: random.Random) -> tuple[str, str]:
        a, b = rng.randint(2, high), rng.randint(2, high)
        return f"{a}{joint}{b}", answer(a, b)

    return family(name, description, phrasings, draw)


def _next_prime(n: int) -> str:
    candidate = n + 1
    while any(candidate % divisor == 0 for divisor in range(2, math.isqrt(candidate) + 1)):
        candidate += 1
    return str(candidate)


def _ordinal(n: int) -> str:
    return str(num2words(n, to="ordinal_num"))


NUMBER_FAMILIES = (
    _of_number("binary", "a number in binary", "{:b}".format, "Binary of {}", "{} as bits", "Base two, from {}:"),
    _of_number(
        "hexadecimal",
        "a number in hexadecimal",
        "0x{:x}".format,
        "hex({})",
        "{} in base sixteen",
        "Hexadecimal for {}?",
    ),
    _of_number(
        "ordinal",
        "a number as an ordinal",
        _ordinal,
        "Ordinal: {}",
        "The runner came in at place {}, that is",
        "Floor number {} is called the",
    ),
    _of_number(
        "spanish-words",
        "a number in Spanish words",
        lambda n: str(num2words(n, lang="es")),
        "Escribe {} con letras.",
        "¿Cómo se dice {} en español?",
        "El cheque es de {} euros. En palabras:",
    ),
    _of_number(
        "italian-words",
        "a number in Italian words",
        lambda n: str(num2words(n, lang="it")),
        "Scrivi {} in lettere.",
        "Come si dice {} in italiano?",
        "L'assegno è di {} euro. A parole:",
    ),
    _of_number(
        "square", "a number squared", lambda n: str(n * n), "{} squared", "{} ** 2", "A square has sides of {} m. Area?"
    ),
    _of_number(
        "double", "twice a number", lambda n: str(2 * n), "Twice {}", "Double {}.", "Two boxes of {} apples make"
    ),
    _of_number(
        "digit-sum",
        "the sum of a number's digits",
        lambda n: str(sum(map(int, str(n)))),
        "Digit sum of {}",
        "Add up the digits of {}.",
        "Cross total for {}?",
    ),
    _of_number(
        "even-or-odd",
        "even or odd",
        lambda n: "odd" if n % 2 else "even",
        "Is {} even or odd?",
        "Parity of {}",
        "{} people pair up. Even or odd?",
    ),
    _of_number(
        "next-prime",
        "the next prime",
        _next_prime,
        "Next prime after {}",
        "Smallest prime above {}",
        "Beyond {}, the first prime is",
    ),
    _of_number(
        "thousands",
        "a number with separators",
        "{:,}".format,
        "Add thousands separators to {}",
        "Format {} with commas.",
        "Bank statement style: {}",
        low=10_000,
        high=99_999_999,
    ),
    _of_two("addition", "a sum", " + ", lambda a, b: str(a + b), "{} = ?", "Calculate {}", "Add: {}"),
    _of_two(
        "product", "a product", " times ", lambda a, b: str(a * b), "What is {}?", "Multiply {}.", "Times table: {}"
    ),
    _of_two(
        "greatest-divisor",
        "the greatest common divisor",
        " and ",
        lambda a, b: str(math.gcd(a, b)),
        "Greatest common divisor of {}",
        "gcd of {}",
        "Which is the largest whole number to divide both {}?",
    ),
    _of_two(
        "percentage",
        "a percentage",
        " percent of ",
        lambda a, b: f"{a * b / 100:g}",
        "Work out {}.",
        "{} is",
        "The shop takes {} off. How much is that?",
    ),
)

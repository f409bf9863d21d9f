"""A sentence about a person, turned into a JSON object."""

import json
import random

from faker import Faker

from tasks.base import Item, Splits, Task, split

TEMPLATES = (
    "{name}, {age}, lives in {city}.",
    "{name} is {age} years old and comes from {city}.",
    "Meet {name} from {city}, aged {age}.",
    "In {city} we met {name} ({age}).",
    "At {age}, {name} moved to {city}.",
    "{city} is the home of {name}, who is {age}.",
)


def _people() -> Splits:
    fake = Faker(["en_US", "en_GB", "de_DE"])
    fake.seed_instance(41)
    rng = random.Random(42)
    items = []
    for _ in range(1100):
        name = f"{fake.first_name()} {fake.last_name()}"
        facts = {"name": name, "age": rng.randint(18, 99), "city": fake.city()}
        sentence = rng.choice(TEMPLATES).format(**facts)
        items.append(Item(f"JSON: {sentence}", json.dumps(facts, ensure_ascii=False)))
    return split(items, 43, 900)


def same_object(answer_text: str, item: Item) -> bool:
    """The answer is a JSON document equal to the truth (an age in quotes is not)."""
    try:
        return bool(json.loads(answer_text) == json.loads(item.answer))
    except json.JSONDecodeError:
        return False


PERSON_JSON = Task(
    "person-json",
    "a sentence to a JSON object with name, age and city",
    "faker, json",
    _people,
    same_object,
    max_new_tokens=48,
)

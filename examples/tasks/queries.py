"""Questions over one table of staff, answered in SQL."""

import random
import sqlite3
from functools import cache

from faker import Faker

from tasks.base import Item, Splits, Task, split

CITIES = ("Oslo", "Rome", "Lima", "Cairo", "Delhi", "Tokyo", "Perth", "Boston")
TEAMS = ("sales", "legal", "research", "support", "design", "finance")
COLUMNS = ("name", "city", "team", "age", "salary")
MAX_STEPS = 100_000

TEMPLATES = (
    ("How many people work in {city}?", "SELECT COUNT(*) FROM staff WHERE city = '{city}'"),
    (
        "How many {team} people are in {city}?",
        "SELECT COUNT(*) FROM staff WHERE team = '{team}' AND city = '{city}'",
    ),
    ("Who in {city} is older than {age}?", "SELECT name FROM staff WHERE city = '{city}' AND age > {age}"),
    ("Who in {team} is younger than {age}?", "SELECT name FROM staff WHERE team = '{team}' AND age < {age}"),
    ("What is the average salary in {team}?", "SELECT AVG(salary) FROM staff WHERE team = '{team}'"),
    ("What is the average age in {city}?", "SELECT AVG(age) FROM staff WHERE city = '{city}'"),
    ("What is the highest salary in {city}?", "SELECT MAX(salary) FROM staff WHERE city = '{city}'"),
    (
        "What is the lowest salary for {team} in {city}?",
        "SELECT MIN(salary) FROM staff WHERE team = '{team}' AND city = '{city}'",
    ),
    (
        "Name the {top} oldest people in {team}.",
        "SELECT name FROM staff WHERE team = '{team}' ORDER BY age DESC LIMIT {top}",
    ),
    (
        "Name the {top} best paid people in {city}.",
        "SELECT name FROM staff WHERE city = '{city}' ORDER BY salary DESC LIMIT {top}",
    ),
    (
        "How many people per city earn more than {salary}?",
        "SELECT city, COUNT(*) FROM staff WHERE salary > {salary} GROUP BY city",
    ),
    (
        "What is the average salary per team above age {age}?",
        "SELECT team, AVG(salary) FROM staff WHERE age > {age} GROUP BY team",
    ),
)


def _queries() -> Splits:
    rng = random.Random(51)
    items = []
    for _ in range(1800):
        question, query = rng.choice(TEMPLATES)
        slots = {
            "city": rng.choice(CITIES),
            "team": rng.choice(TEAMS),
            "age": rng.randint(25, 60),
            "salary": rng.randrange(3000, 9000, 100),
            "top": rng.randint(2, 9),
        }
        items.append(Item(f"SQL, staff({', '.join(COLUMNS)}): {question.format(**slots)}", query.format(**slots)))
    return split(items, 52, 600)


@cache
def _staff() -> sqlite3.Connection:
    """A table of 400 made-up people with distinct salaries, in memory, that only answers SELECT."""
    fake = Faker("en_US")
    fake.seed_instance(53)
    rng = random.Random(54)
    salaries = rng.sample(range(2500, 9500), 400)
    connection = sqlite3.connect(":memory:")
    connection.execute(f"CREATE TABLE staff ({', '.join(COLUMNS)})")
    connection.executemany(
        "INSERT INTO staff VALUES (?, ?, ?, ?, ?)",
        [(fake.name(), rng.choice(CITIES), rng.choice(TEAMS), rng.randint(20, 65), pay) for pay in salaries],
    )
    allowed = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION}
    connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in allowed else sqlite3.SQLITE_DENY)
    connection.set_progress_handler(lambda: 1, MAX_STEPS)  # ends a query that joins without end
    return connection


def run_query(query: str) -> list[tuple[object, ...]] | None:
    """The rows in their order, or None where SQLite refuses the query."""
    try:
        return _staff().execute(query).fetchall()
    except (sqlite3.Error, sqlite3.Warning):
        return None


def same_rows(answer_text: str, item: Item) -> bool:
    """The answer runs and gives the same rows; their order counts only where the truth orders them."""
    got, want = run_query(answer_text), run_query(item.answer)
    if got is None or want is None:
        return False
    return got == want if "ORDER BY" in item.answer else sorted(got, key=repr) == sorted(want, key=repr)


STAFF_SQL = Task(
    "staff-sql",
    "a question about one table to SQL, compared by running it",
    "sqlite3",
    _queries,
    same_rows,
    max_new_tokens=48,
)

"""TOML that is nearly right."""

import json
from collections.abc import Mapping, Sequence
from random import Random

from tests.fuzz.mutate import TEXTS, corrupt

VALUES = (
    "0", "1", "-1", "70000", "1e400", "nan", "-inf", "0x10", "99999999999999999999", '""', '"a"', "'x'", '"\\ud800"',
    "true", "false", "[]", "[1, 2]", '["a", "b"]', "{}", "{a = 1}", "2027-01-31", "2027-13-45", "2027-01-31T00:00:00Z",
    "0001-01-01T00:00:00+23:59", "9999-12-31", "07:32:00", "[[[]]]", '"""', "1__0", "",
)  # fmt: skip


def written(tables: Mapping[str, Mapping[str, str]]) -> str:
    """Tables of keys and their values as TOML has them."""
    return "\n".join(
        "\n".join([f"[{name}]", *(f"{key} = {value}" for key, value in table.items()), ""])
        for name, table in tables.items()
    )


def spoiled(random: Random, tables: Mapping[str, Mapping[str, str]], odd_keys: Sequence[str] = ()) -> bytes:
    """The tables with keys, values, headers or bytes changed."""
    changed = {name: dict(table) for name, table in tables.items()}
    for _ in range(random.choice((1, 1, 2, 4))):
        name = random.choice(list(changed))
        table = changed[name]
        match random.randrange(6):
            case 0:
                table.pop(random.choice(list(table)), None) if table else None
            case 1:
                table[random.choice((*odd_keys, *(json.dumps(text) for text in TEXTS[:12])))] = random.choice(VALUES)
            case 2:
                changed[random.choice((name + "x", name.split(".")[0], '"é"', "a.b.c", name + '."a"'))] = dict(table)
            case _:
                if table:
                    table[random.choice(list(table))] = random.choice(VALUES)
    text = written(changed)
    if random.random() < 0.05:
        text += "a = " + "[" * 2000
    if random.random() < 0.05:
        text += written({random.choice(list(changed)): {}})
    raw = text.encode("utf-8", "surrogatepass")
    return corrupt(random, raw) if random.random() < 0.3 else raw

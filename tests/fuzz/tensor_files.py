"""Safetensors files that are nearly right."""

import json
from collections.abc import Mapping
from random import Random
from typing import Any

from tests.fuzz.mutate import U64, corrupt, json_bytes, mutate

DTYPES = ("F32", "F16", "BF16", "F64", "I32", "I64", "U8", "BOOL", "F8_E4M3", "f32", "", "F32\0", 4, None)


def parts(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a good file."""
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def packed(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """A file of these parts; `length` is what it says of its header."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def spoiled(random: Random, raw: bytes) -> bytes:
    """A good file with its bytes, its header or its table changed."""
    header, data = parts(raw)
    header_bytes = 8 + int.from_bytes(raw[:8], "little")
    match random.randrange(6):
        case 0:
            return corrupt(random, raw, header_bytes)
        case 1:
            return corrupt(random, raw)
        case 2:
            return packed(json_bytes(random, header), data, random.choice(U64))
        case 3:
            return packed(json_bytes(random, mutate(random, header)), data)
        case _:
            told = json.dumps(_table(random, header)).encode("utf-8", "surrogatepass")
            return packed(told, data if random.random() < 0.8 else data + random.randbytes(random.choice((1, 64))))


def _table(random: Random, header: Mapping[str, Any]) -> dict[str, Any]:
    """The header with one tensor's entry changed in a way that only this format has."""
    changed = {name: dict(entry) for name, entry in header.items()}
    name, other = random.choice(list(changed)), random.choice(list(changed))
    entry = changed[name]
    begin, end = entry["data_offsets"]
    match random.randrange(9):
        case 0:  # two tensors, the same bytes
            entry["data_offsets"] = changed[other]["data_offsets"]
        case 1:
            entry["data_offsets"] = [begin + random.choice((-4, 4, 1)), end + random.choice((-4, 4, 0))]
        case 2:
            entry["data_offsets"] = [random.choice(U64), random.choice(U64)]
        case 3:
            entry["shape"] = [random.choice(U64) for _ in range(random.randrange(10))]
        case 4:  # as many numbers, arranged otherwise
            entry["shape"] = random.choice(([*entry["shape"], 1], entry["shape"][::-1], [0, *entry["shape"]]))
        case 6 | 7:  # more numbers than there are, in one voice or not
            count = random.choice((1 << 20, 1 << 28, 1 << 31, 1 << 40))
            entry["shape"] = [count] if random.random() < 0.5 else [count >> 4, 16]
            entry["data_offsets"] = [begin, begin + 4 * count] if random.random() < 0.5 else [begin, end]
        case 5:
            entry["dtype"] = random.choice(DTYPES)
        case _:
            changed[name.replace("0", random.choice(("9", "1", "00", "-1", "99999999")))] = changed.pop(name)
    return changed

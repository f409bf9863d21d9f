"""A small whole GGUF file as a list of parts, so that each can be changed. Written by hand: the library's writer
refuses most of what is wanted here."""

import struct
from random import Random
from typing import Any

from tests.fuzz.mutate import NUMBERS, TEXTS, U64

UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, FLOAT64 = 4, 5, 6, 7, 8, 9, 10, 12
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
Key = tuple[str, int, Any]
Tensor = tuple[str, list[int], int, int]  # name, dimensions (innermost first), type, offset

HIDDEN, FFN, LAYERS, HEADS = 32, 64, 1, 2
VOCAB = ["<unk>", "<s>", "</s>", *(chr(byte) for byte in range(33, 127)), "Ġ", "ab", "cd", "abcd"]


def keys(model: str) -> list[Key]:
    """The metadata of a Llama with a vocabulary of `model`: gpt2 or llama."""
    merges = ["a b", "c d", "ab cd"]
    return [
        ("general.architecture", STRING, "llama"),
        ("general.name", STRING, "tiny"),
        ("general.alignment", UINT32, 32),
        ("llama.context_length", UINT32, 64),
        ("llama.embedding_length", UINT32, HIDDEN),
        ("llama.block_count", UINT32, LAYERS),
        ("llama.feed_forward_length", UINT32, FFN),
        ("llama.attention.head_count", UINT32, HEADS),
        ("llama.attention.head_count_kv", UINT32, 1),
        ("llama.attention.layer_norm_rms_epsilon", FLOAT32, 1e-5),
        ("llama.rope.freq_base", FLOAT32, 10000.0),
        ("llama.rope.dimension_count", UINT32, HIDDEN // HEADS),
        ("llama.vocab_size", UINT32, len(VOCAB)),
        ("tokenizer.ggml.model", STRING, model),
        ("tokenizer.ggml.pre", STRING, "smollm"),
        ("tokenizer.ggml.tokens", ARRAY, (STRING, VOCAB)),
        ("tokenizer.ggml.scores", ARRAY, (FLOAT32, [-float(place) for place in range(len(VOCAB))])),
        ("tokenizer.ggml.token_type", ARRAY, (INT32, [2, 3, 3, *([1] * (len(VOCAB) - 3))])),
        ("tokenizer.ggml.merges", ARRAY, (STRING, merges)),
        ("tokenizer.ggml.bos_token_id", UINT32, 1),
        ("tokenizer.ggml.eos_token_id", UINT32, 2),
        ("tokenizer.ggml.unknown_token_id", UINT32, 0),
        ("tokenizer.ggml.add_bos_token", BOOL, True),
        ("tokenizer.chat_template", STRING, "{{ messages[0]['content'] }}"),
    ]


def tensors() -> list[Tensor]:
    """The table: everything in F32."""
    shapes = {"token_embd.weight": [HIDDEN, len(VOCAB)], "output_norm.weight": [HIDDEN]}
    for layer in range(LAYERS):
        for name, shape in {
            "attn_norm": [HIDDEN], "attn_q": [HIDDEN, HIDDEN], "attn_k": [HIDDEN, HIDDEN // HEADS],
            "attn_v": [HIDDEN, HIDDEN // HEADS], "attn_output": [HIDDEN, HIDDEN], "ffn_norm": [HIDDEN],
            "ffn_gate": [HIDDEN, FFN], "ffn_up": [HIDDEN, FFN], "ffn_down": [FFN, HIDDEN],
        }.items():  # fmt: skip
            shapes[f"blk.{layer}.{name}.weight"] = shape
    table, offset = [], 0
    for name, shape in shapes.items():
        table.append((name, shape, 0, offset))
        offset += -(-_count(shape) * 4 // 32) * 32
    return table


def _count(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def header(told: list[Key], table: list[Tensor], num_tensors: int | None = None, num_keys: int | None = None) -> bytes:
    """The bytes before the numbers."""
    raw = b"GGUF" + struct.pack("<IQQ", 3, len(table) if num_tensors is None else num_tensors, num_keys or len(told))
    for name, kind, value in told:
        raw += _string(name) + struct.pack("<I", kind) + _value(kind, value)
    for name, shape, kind, offset in table:
        raw += _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return raw


def whole(raw: bytes, table: list[Tensor], alignment: int = 32) -> bytes:
    """With zeros for numbers behind it."""
    size = sum(-(-_count(shape) * 4 // 32) * 32 for _, shape, *_ in table)
    return raw + bytes(-len(raw) % alignment) + bytes(size)


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def _value(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return _string(value)
    if kind == ARRAY:
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(_value(inner, item) for item in items)
    return struct.pack("<" + _CODES[kind], value)


def spoiled_key(random: Random, told: list[Key]) -> list[Key]:
    """One entry of the metadata changed: left out, twice, of another type, or with another value of its type."""
    place = random.randrange(len(told))
    name, kind, value = told[place]
    match random.randrange(6):
        case 0:
            return told[:place] + told[place + 1 :]
        case 1:
            return [*told, (name, *_typed(random))]
        case 2:
            return [*told[:place], (name, *_typed(random)), *told[place + 1 :]]
        case 3:
            odd = random.choice(("llama.expert_count", "llama.rope.scaling.type", "split.count", "general.alignment"))
            return [*told, (odd, *_typed(random))]
    return [*told[:place], (name, kind, _other(random, kind, value)), *told[place + 1 :]]


def _typed(random: Random) -> tuple[int, Any]:
    kind = random.choice((UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, FLOAT64))
    if kind != ARRAY:
        return kind, _other(random, kind, None)
    inner = random.choice((UINT32, STRING, FLOAT32, BOOL))
    return kind, (inner, [_other(random, inner, None) for _ in range(random.choice((0, 1, 3, 100)))])


def _other(random: Random, kind: int, value: Any) -> Any:
    """A value that fits the type's bytes."""
    if kind == STRING:
        return random.choice((*TEXTS, "gpt2", "llama", "bert", "qwen2", "llama3", "a b c", "Ġ"))
    if kind == BOOL:
        return random.random() < 0.5
    if kind in {FLOAT32, FLOAT64}:
        return random.choice(
            [number for number in NUMBERS if isinstance(number, float) and not 1e38 < abs(number) < 1e309]
        )
    if kind == ARRAY:
        inner, items = value
        place = random.randrange(len(items)) if items else 0
        match random.randrange(4):
            case 0:
                return inner, items[:place]
            case 1:
                return inner, [*items, *items]
            case 2:
                return random.choice((UINT32, INT32)), [place for place, _ in enumerate(items)]
        return inner, [*items[:place], _other(random, inner, None), *items[place + 1 :]]
    bits = 32 if kind in {UINT32, INT32} else 64
    number = random.choice((*U64, value or 3, (value or 3) + 1)) & ((1 << bits) - 1)
    return number - (1 << bits) if kind == INT32 and number >> (bits - 1) else number


def spoiled_table(random: Random, table: list[Tensor]) -> list[Tensor]:
    """One tensor of the table changed."""
    place = random.randrange(len(table))
    name, shape, kind, offset = table[place]
    match random.randrange(6):
        case 0:
            return table[:place] + table[place + 1 :]
        case 1:
            return [*table, (random.choice((name, name + "x", *TEXTS[:12])), shape, kind, offset)]
        case 2:
            shape = random.choice(
                ([random.choice(U64)], [*shape, 1], shape[::-1], [], [0], [random.choice(U64)] * 4, [1] * 60)
            )
        case 3:
            kind = random.choice((0, 1, 2, 3, 8, 12, 14, 16, 24, 30, 31, 40, 41, 99, (1 << 32) - 1))
        case 4:
            offset = random.choice((*U64, offset + 1, offset + 32))
        case _:
            name = random.choice(
                (*TEXTS, "output.weight", "rope_freqs.weight", "blk.0.attn_q.bias", "blk.9.attn_q.weight")
            )
    return [*table[:place], (name, shape, kind, offset), *table[place + 1 :]]

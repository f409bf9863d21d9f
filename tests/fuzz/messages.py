"""Protobuf messages made from their descriptors: any field, any value that the wire can carry, and some more."""

import struct
from random import Random
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from tests.fuzz.mutate import corrupt

TEXTS = (
    "", "a", "one", "two", "gates", "heads", "auto", "base", "tiny", "source", "nobody", "user", "assistant", "system",
    "a\nb", "\0", "語", "🦙" * 40, "../../etc/passwd", "/dev/zero", "x" * 3000, "<end>", "{{ 1 }}", "%s", "é" * 129,
    "perseid.v1.Generation", "perseid/v1/generation.proto", "grpc.health.v1.Health", ".", "..", "://",
)  # fmt: skip
FLOATS = (
    0.0,
    -0.0,
    1.0,
    0.5,
    -1.0,
    2.0,
    1e-38,
    3.4e38,
    -3.4e38,
    float("nan"),
    float("inf"),
    float("-inf"),
    100.0,
    16.5,
)
EDGES = (0, 1, 2, 3, 4, 9, 20, 21, 127, 128, 255, 256, 257, 258, 1 << 16, (1 << 31) - 1)
_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (*EDGES, -1, -(1 << 31)),
    FieldDescriptor.CPPTYPE_UINT32: (*EDGES, 1 << 31, (1 << 32) - 1),
    FieldDescriptor.CPPTYPE_INT64: (*EDGES, -1, -(1 << 63), (1 << 63) - 1),
    FieldDescriptor.CPPTYPE_UINT64: (*EDGES, 1 << 32, 1 << 63, (1 << 64) - 1),
}


def value(random: Random, field: FieldDescriptor, depth: int) -> Any:
    """A value of a field's type, mostly at an edge."""
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            is_bytes = field.type == FieldDescriptor.TYPE_BYTES
            return random.randbytes(random.choice((0, 1, 100))) if is_bytes else random.choice(TEXTS)
        case FieldDescriptor.CPPTYPE_BOOL:
            return random.random() < 0.5
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            return random.choice(FLOATS)
        case FieldDescriptor.CPPTYPE_ENUM:  # open in proto3: any number can be sent
            return random.choice((*(one.number for one in field.enum_type.values), -1, 99, (1 << 31) - 1))
        case FieldDescriptor.CPPTYPE_MESSAGE:
            return message(random, field.message_type, depth - 1)
    return random.choice(_INTEGERS[field.cpp_type])


def message(random: Random, descriptor: Descriptor, depth: int = 3) -> Message:
    """A message with some of its fields set."""
    built = GetMessageClass(descriptor)()
    share = random.choice((0.1, 0.3, 0.3, 0.9)) if depth > 0 else 0.0
    for field in descriptor.fields:
        if random.random() < share:
            fill(random, built, field, depth)
    return built


def fill(random: Random, built: Message, field: FieldDescriptor, depth: int = 3) -> None:
    """Set a field. Of a oneof's fields that are set one after the other, the last counts."""
    if not field.is_repeated:
        put(built, field, value(random, field, depth))
        return
    count = random.choice((0, 1, 1, 2, 3, 17, 600)) if depth > 1 else random.choice((0, 1, 2))
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, item = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        for _ in range(count):
            getattr(built, field.name)[value(random, key, depth)] = value(random, item, depth)
        return
    getattr(built, field.name).extend(value(random, field, depth) for _ in range(min(count, 40) if depth else 0))


def put(built: Message, field: FieldDescriptor, item: Any) -> None:
    """Set a field that is there once."""
    if field.message_type is None:
        setattr(built, field.name, item)
    else:
        getattr(built, field.name).CopyFrom(item)


def changed(random: Random, good: Message) -> Message:
    """A good message with one to three fields, somewhere in it, set to something else."""
    copy = type(good)()
    copy.CopyFrom(good)
    for _ in range(random.choice((1, 1, 2, 3))):
        at: Message = copy
        while True:
            field = random.choice(at.DESCRIPTOR.fields or [None])
            if field is None:
                break
            inside = field.message_type is not None and not field.is_repeated
            if inside and random.random() < 0.7:
                at = getattr(at, field.name)
                continue
            at.ClearField(field.name)
            fill(random, at, field)
            break
    return copy


def wire(random: Random, built: Message) -> bytes:
    """As bytes: as they are, changed, or with something that no message of the type has."""
    raw = built.SerializeToString()
    match random.randrange(8):
        case 0:
            return corrupt(random, raw or b"\x0a\x01a")
        case 1:
            return raw + unknown_field(random)
        case 2:
            return raw + raw  # each field twice: merged, lists appended
        case 3:
            return random.choice((b"", b"\xff" * 12, random.randbytes(40), nested(random), b"\x12\x02\xff\xfe"))
    return raw


def unknown_field(random: Random) -> bytes:
    """Field 1000 and something, of any wire type; groups and types that do not exist among them."""
    kind, number = random.randrange(8), random.choice((0, 13, 1000, (1 << 29) - 1))
    tag = varint(number << 3 | kind)
    match kind:
        case 0:
            return tag + random.choice((b"\x01", b"\xff" * 9 + b"\x01", b"\xff" * 11))
        case 1:
            return tag + struct.pack("<d", random.choice(FLOATS))
        case 2:
            return tag + varint(random.choice((0, 3, 1 << 31, (1 << 63) - 1))) + b"abc"
        case 5:
            return tag + b"abcd"
    return tag + b"\x01" * random.randrange(3)


def nested(random: Random) -> bytes:
    """Field 3 in field 3 in field 3."""
    raw = b""
    for _ in range(random.choice((50, 99, 101, 3000))):
        raw = b"\x1a" + varint(len(raw)) + raw
    return raw


def varint(number: int) -> bytes:
    """As protobuf writes whole numbers."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*out, number))

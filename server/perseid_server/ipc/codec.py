"""Messages as bytes: a 4-byte length, then msgpack of [tag, message].

The tag is the message's place in the union's list, so that plain dataclasses can cross without knowing about it.
"""

import struct
from collections.abc import Iterator
from typing import Any, Generic, TypeVar, get_args

import msgspec

from perseid_server.engine.messages import FromEngine, ToEngine

Message = TypeVar("Message")
_LENGTH = struct.Struct("<I")
HEADER_BYTES = _LENGTH.size


class Codec(Generic[Message]):
    """Encodes and decodes the members of a union of dataclasses."""

    def __init__(self, union: Any) -> None:
        kinds: tuple[type, ...] = get_args(union)
        self._tag_of = {kind: tag for tag, kind in enumerate(kinds)}
        self._decoders: list[msgspec.msgpack.Decoder[Any]] = [msgspec.msgpack.Decoder(kind) for kind in kinds]
        self._frame: msgspec.msgpack.Decoder[tuple[int, msgspec.Raw]] = msgspec.msgpack.Decoder(tuple[int, msgspec.Raw])
        self._encoder = msgspec.msgpack.Encoder()

    def encode(self, message: Message) -> bytes:
        """One frame."""
        body = self._encoder.encode((self._tag_of[type(message)], message))
        return _LENGTH.pack(len(body)) + body

    def decode(self, body: bytes | memoryview) -> Message:
        """The message of a frame without its length. msgspec.MsgspecError on anything else."""
        tag, raw = self._frame.decode(body)
        if not 0 <= tag < len(self._decoders):
            raise msgspec.ValidationError(f"there is no message of kind {tag}")
        message: Message = self._decoders[tag].decode(raw)
        return message


to_engine: Codec[ToEngine] = Codec(ToEngine)
from_engine: Codec[FromEngine] = Codec(FromEngine)


def frame_length(header: bytes) -> int:
    """Bytes of the body that follows a header."""
    length: int = _LENGTH.unpack(header)[0]
    return length


def split_frames(buffer: bytearray) -> Iterator[bytes]:
    """Take the whole frames out of a buffer of received bytes; what is left is the beginning of the next."""
    start = 0
    while len(buffer) - start >= HEADER_BYTES:
        end = start + HEADER_BYTES + _LENGTH.unpack_from(buffer, start)[0]
        if len(buffer) < end:
            break
        yield bytes(buffer[start + HEADER_BYTES : end])
        start = end
    del buffer[:start]

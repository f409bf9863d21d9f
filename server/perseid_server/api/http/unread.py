"""What of its answers a client has not taken yet, and how much it has.

What a transport tells is only a part: under TLS a layer below keeps as much again, and the system some hundreds of KiB.
So the system is asked too. Where it cannot tell (only Linux does), the transport's part has to do.
"""

import asyncio
import socket
import struct
from dataclasses import dataclass

_TCP_INFO = struct.Struct("=24xI92xQ16xI")  # of struct tcp_info: tcpi_unacked, tcpi_bytes_acked, tcpi_notsent_bytes


@dataclass(frozen=True, slots=True)
class Unread:
    """As it is at one moment; two that are the same tell that the client has taken nothing between them."""

    in_process: int  # bytes
    in_system: bool
    taken: int  # bytes, since the connection began

    @classmethod
    def of(cls, transport: asyncio.Transport) -> "Unread":
        """Of a connection that has not been lost."""
        unacknowledged, taken, not_sent = _asked(transport)
        return cls(transport.get_write_buffer_size(), bool(unacknowledged or not_sent), taken)

    def __bool__(self) -> bool:
        return self.in_system or self.in_process > 0


def _asked(transport: asyncio.Transport) -> tuple[int, int, int]:
    connection, option = transport.get_extra_info("socket"), getattr(socket, "TCP_INFO", None)
    try:
        return _TCP_INFO.unpack(connection.getsockopt(socket.IPPROTO_TCP, option, _TCP_INFO.size))
    except (AttributeError, TypeError, OSError, struct.error):  # no such option, or a shorter answer
        return 0, 0, 0

"""Who could reach an address, before anybody listens on it. Standard library only."""

import ipaddress
import socket

from perseid_server.errors import InvalidRequest


def check_exposure(host: str, *, has_keys: bool, insecure: bool) -> None:
    """Without keys a server listens on loopback only, unless the operator says otherwise. InvalidRequest tells the ways
    out, or that the host is not known."""
    if has_keys or insecure or is_loopback(host):
        return
    raise InvalidRequest(
        f"--host {host}: without API keys anybody who reaches this address could use the server and change its "
        'adapters. Make keys ("perseid keys new NAME --api-keys FILE") and give them with --api-keys FILE, or say '
        "--insecure-listen if something else guards the address, or listen on 127.0.0.1",
        field="host",
    )


def is_loopback(host: str) -> bool:
    """Whether all addresses that a host stands for can be reached from this machine alone."""
    if not host:
        return False
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a name"
        raise InvalidRequest(f"--host {host!r}: no such address: {why}", field="host") from error
    return all(_is_loopback(str(address[0])) for *_, address in found)


def _is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_loopback

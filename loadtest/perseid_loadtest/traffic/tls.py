"""The load generator's certificates: whom it trusts, and what it shows to a server that asks for one."""

import ssl
from pathlib import Path
from typing import NamedTuple

from perseid_loadtest.traffic.options import LoadtestOptions
from perseid_server.errors import InvalidRequest

HINT = " And does it trust, and is it trusted by, these certificates?"
"""Behind what is said of a server with TLS that does not answer."""


class Pem(NamedTuple):
    """In the order in which gRPC takes them. None: the system's authorities, and nothing to show."""

    ca: bytes | None = None
    key: bytes | None = None
    cert: bytes | None = None


def pem_of(options: LoadtestOptions) -> Pem:
    """For gRPC."""
    return Pem(*(_read(name, getattr(options, name)) for name in ("ca", "client_key", "client_cert")))


def context_of(options: LoadtestOptions) -> ssl.SSLContext | None:
    """For HTTP; None: the system's authorities, and nothing to show. InvalidRequest names the file that cannot be
    used, also where only gRPC will need it."""
    if options.ca is None and options.client_cert is None:
        return None
    context = _trusting(options.ca)
    if options.client_cert is not None and options.client_key is not None:
        _show(context, options.client_cert, options.client_key)
    return context


def _trusting(ca: Path | None) -> ssl.SSLContext:
    _read("ca", ca)
    try:
        return ssl.create_default_context(cafile=ca)
    except ssl.SSLError as error:
        raise _error("ca", f"{ca}: not a PEM file with certificates") from error


def _show(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    _read("client_cert", cert)
    _read("client_key", key)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cert)
    except ssl.SSLError as error:
        raise _error("client_cert", f"{cert}: not a PEM file with a certificate") from error
    try:
        context.load_cert_chain(cert, key, _no_password)
    except _EncryptedKey as error:
        raise _error("client_key", f"{key}: it has a password; expected a key without one") from error
    except ssl.SSLError as error:
        is_other = error.reason == "KEY_VALUES_MISMATCH"
        why = f"it does not belong to the certificate {cert}" if is_other else "not a PEM file with a private key"
        raise _error("client_key", f"{key}: {why}") from error


class _EncryptedKey(Exception):
    """The key has a password."""


def _no_password() -> str:
    raise _EncryptedKey


def _read(name: str, path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise _error(name, f"{path}: {(error.strerror or 'cannot be read').lower()}") from error


def _error(field: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"--{field.replace('_', '-')}: {what}", field=field)

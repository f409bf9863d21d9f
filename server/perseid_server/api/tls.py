"""TLS for both transports: checked before anybody listens, read again when the files change.

What is checked is what will happen: the certificate is presented in a handshake within this process, to a client that
trusts it alone.
"""

import logging
import ssl
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import grpc

from perseid_server.access.followed import Followed, Unreadable
from perseid_server.errors import InvalidRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """All PEM. `client_ca`: who signs clients' certificates, None where they need none."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    @staticmethod
    def of(cert: Path | None, key: Path | None, client_ca: Path | None) -> "TlsFiles | None":
        """None where there is no TLS. InvalidRequest for a part without the others."""
        if cert is None and key is None and client_ca is None:
            return None
        if cert is None or key is None:
            missing = "--tls-cert" if cert is None else "--tls-key"
            raise InvalidRequest(f"{missing} is missing: TLS needs --tls-cert and --tls-key", field="tls_cert")
        return TlsFiles(cert, key, client_ca)


@dataclass(frozen=True, slots=True)
class _Pair:
    """A certificate and its key, PEM, and a context that presents the very same."""

    cert: bytes
    key: bytes
    context: ssl.SSLContext


class Tls:
    """A certificate in use. `refresh` from one thread only."""

    def __init__(self, files: TlsFiles) -> None:
        """InvalidRequest names the file and what is wrong with it."""
        self._client_ca = None if files.client_ca is None else _authorities(files.client_ca)
        self._pair = Followed(
            partial(_signature, files), partial(_checked, files, self._client_ca), "the certificate stays as it was"
        )

    @property
    def context(self) -> ssl.SSLContext:
        """Of an HTTP connection that comes now. Nothing changes it: a new certificate has a context of its own, so one
        that is half written harms no connection."""
        return self._pair.content.context

    def credentials(self) -> grpc.ServerCredentials:
        """Of gRPC, which asks at every handshake for the certificate."""
        told = [self._pair.content]

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            """None: as before."""
            pair = self._pair.content
            if pair is told[0]:
                return None
            told[0] = pair
            return self._configuration(pair)

        credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
            self._configuration(told[0]),
            fetch,  # type: ignore[arg-type]  # None is allowed, and means no change
            require_client_authentication=self._client_ca is not None,
        )
        return credentials

    def refresh(self) -> None:
        """Take over a new certificate and key. Ones that are wrong change nothing."""
        if self._pair.refresh():
            logger.info("the TLS certificate has been read again")

    def _configuration(self, pair: _Pair) -> grpc.ServerCertificateConfiguration:
        configuration: grpc.ServerCertificateConfiguration = grpc.ssl_server_certificate_configuration(
            [(pair.key, pair.cert)], root_certificates=self._client_ca
        )
        return configuration


def _checked(files: TlsFiles, client_ca: bytes | None) -> _Pair:
    """Certificate and key as they are in the files, good for a server. InvalidRequest says what is not."""
    cert, key = _read_pair(files)
    if b"-----BEGIN CERTIFICATE-----" not in cert:
        _refuse("--tls-cert", files.cert, "not PEM: it has no BEGIN CERTIFICATE")
    if b"PRIVATE KEY-----" not in key:
        _refuse("--tls-key", files.key, "not PEM: it has no BEGIN PRIVATE KEY")
    context = _context(files, cert)
    if _read_pair(files) != (cert, key):  # Python reads them by their paths alone, once more
        raise Unreadable(f"--tls-cert {files.cert}, --tls-key {files.key}: they change just now", field="tls_cert")
    _check_handshake(files, cert, context)
    if client_ca is not None:
        context.load_verify_locations(cadata=_text(client_ca))
        context.verify_mode = ssl.CERT_REQUIRED
    return _Pair(cert, key, context)


def _read_pair(files: TlsFiles) -> tuple[bytes, bytes]:
    return _read("--tls-cert", files.cert), _read("--tls-key", files.key)


def _read(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(option, path, error) from error


def _text(pem: bytes) -> str:
    """As Python takes it. PEM is ASCII; comments around it need not be."""
    return pem.decode("ascii", "ignore")


def _context(files: TlsFiles, cert: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=_text(cert))
    except ssl.SSLError:
        _refuse("--tls-cert", files.cert, "a certificate in it cannot be read")
    try:
        context.load_cert_chain(files.cert, files.key, _no_password)
    except _EncryptedKey:
        _refuse("--tls-key", files.key, "it has a password; store it without one, readable by its owner alone")
    except ssl.SSLError as error:
        mismatch = error.reason == "KEY_VALUES_MISMATCH"
        why = f"it does not belong to the certificate {files.cert}" if mismatch else "a private key that cannot be read"
        _refuse("--tls-key", files.key, why)
    except OSError as error:
        raise _unreadable("--tls-key", files.key, error) from error
    return context


class _EncryptedKey(Exception):
    """The key has a password."""


def _no_password() -> str:
    raise _EncryptedKey


def _authorities(path: Path) -> bytes:
    """Who signs clients' certificates."""
    pem = _read("--tls-client-ca", path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=_text(pem))
    except (ssl.SSLError, ValueError):
        _refuse("--tls-client-ca", path, "not PEM: no certificate in it can be read")
    return pem


def _check_handshake(files: TlsFiles, cert: bytes, server_context: ssl.SSLContext) -> None:
    """What a client would say of the certificate that trusts just this one: expired, not yet valid, not a server's."""
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.check_hostname = False
    client_context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client_context.load_verify_locations(cadata=_text(cert))
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(back, there)
    server = server_context.wrap_bio(there, back, server_side=True)
    try:
        for side in (client, server, client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    except ssl.SSLCertVerificationError as error:
        _refuse("--tls-cert", files.cert, error.verify_message)
    except ssl.SSLError as error:
        _refuse("--tls-cert", files.cert, f"no handshake succeeds with it: {error.reason}")


def _refuse(option: str, path: Path, why: str) -> NoReturn:
    raise InvalidRequest(f"{option} {path}: {why}", field=_field(option))


def _unreadable(option: str, path: Path, error: OSError) -> Unreadable:
    return Unreadable(f"{option} {path}: {error.strerror or 'cannot be read'}", field=_field(option))


def _field(option: str) -> str:
    return option[2:].replace("-", "_")


def _signature(files: TlsFiles) -> tuple[object, ...]:
    told: list[object] = []
    for path in (files.cert, files.key):
        try:
            status = path.stat()
        except OSError:
            told.append(None)
        else:
            told.append((status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(told)

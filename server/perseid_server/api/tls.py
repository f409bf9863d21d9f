"""TLS for both transports: checked before anybody listens, read again when the files change.

What is checked is what will happen: the certificate is presented in a handshake within this process, to a client that
trusts it alone.
"""

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import grpc

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


class Tls:
    """A certificate in use. `refresh` from one thread only."""

    def __init__(self, files: TlsFiles) -> None:
        """InvalidRequest names the file and what is wrong with it."""
        self._files = files
        self._seen = _signature(files)
        self._pem = _checked(files)
        self._client_ca = None if files.client_ca is None else _read("--tls-client-ca", files.client_ca)
        self.context = _context(files)  # of HTTP
        if files.client_ca is not None:
            self.context.load_verify_locations(files.client_ca)
            self.context.verify_mode = ssl.CERT_REQUIRED

    def credentials(self) -> grpc.ServerCredentials:
        """Of gRPC, which asks at every handshake for the certificate."""
        told: list[object] = [self._pem]

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            """None: as before."""
            if self._pem is told[0]:
                return None
            told[0] = self._pem
            return self._configuration()

        credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
            self._configuration(),
            fetch,  # type: ignore[arg-type]  # None is allowed, and means no change
            require_client_authentication=self._client_ca is not None,
        )
        return credentials

    def refresh(self) -> None:
        """Take over a new certificate and key. Ones that are wrong change nothing, and are logged once."""
        signature = _signature(self._files)
        if signature == self._seen:
            return
        self._seen = signature
        try:
            pem = _checked(self._files)
            self.context.load_cert_chain(self._files.cert, self._files.key, _no_password)
        except (InvalidRequest, OSError) as error:
            logger.error("%s; the certificate stays as it was", error)  # noqa: TRY400  the message says it all
            return
        self._pem = pem
        logger.info("the TLS certificate has been read again")

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        cert, key = self._pem
        configuration: grpc.ServerCertificateConfiguration = grpc.ssl_server_certificate_configuration(
            [(key, cert)], root_certificates=self._client_ca
        )
        return configuration


def _checked(files: TlsFiles) -> tuple[bytes, bytes]:
    """Certificate and key as they are in the files, good for a server. InvalidRequest says what is not."""
    cert, key = _read("--tls-cert", files.cert), _read("--tls-key", files.key)
    if b"-----BEGIN CERTIFICATE-----" not in cert:
        _refuse("--tls-cert", files.cert, "not PEM: it has no BEGIN CERTIFICATE")
    if b"PRIVATE KEY-----" not in key:
        _refuse("--tls-key", files.key, "not PEM: it has no BEGIN PRIVATE KEY")
    if files.client_ca is not None:
        _check_authorities(files.client_ca)
    _check_handshake(files, _context(files))
    return cert, key


def _read(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        _refuse(option, path, error.strerror or "cannot be read")


def _context(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(files.cert)
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
    return context


class _EncryptedKey(Exception):
    """The key has a password."""


def _no_password() -> str:
    raise _EncryptedKey


def _check_authorities(path: Path) -> None:
    _read("--tls-client-ca", path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(path)
    except ssl.SSLError:
        _refuse("--tls-client-ca", path, "not PEM: no certificate in it can be read")


def _check_handshake(files: TlsFiles, server_context: ssl.SSLContext) -> None:
    """What a client would say of the certificate that trusts just this one: expired, not yet valid, not a server's."""
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.check_hostname = False
    client_context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client_context.load_verify_locations(files.cert)
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
    raise InvalidRequest(f"{option} {path}: {why}", field=option[2:].replace("-", "_"))


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

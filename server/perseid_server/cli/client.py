"""What the commands that talk to a running server share."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import grpc
from cyclopts import Group, Parameter

from perseid_server.errors import InvalidRequest, PerseidError

DEFAULT_SERVER = "127.0.0.1:50051"
_CONNECTION = Group("Connection", sort_key=100)


@dataclass(frozen=True, kw_only=True)
class Connection:
    """Where the server is, and who calls it."""

    server: Annotated[str, Parameter(group=_CONNECTION, env_var="PERSEID_SERVER")] = DEFAULT_SERVER
    """gRPC address of the server."""

    api_key: Annotated[str | None, Parameter(group=_CONNECTION, env_var="PERSEID_API_KEY", show_default=False)] = None
    """Key to show. Others on this machine can see command lines: PERSEID_API_KEY is better.
    Default: none."""

    tls: Annotated[bool, Parameter(group=_CONNECTION, negative=())] = False
    """Encrypt, and trust the authorities that gRPC knows."""

    tls_ca: Annotated[Path | None, Parameter(group=_CONNECTION, show_default=False)] = None
    """Certificates, PEM, to trust instead; implies --tls. Default: none."""

    client_cert: Annotated[Path | None, Parameter(group=_CONNECTION, show_default=False)] = None
    """Certificate, PEM, to show to a server that asks for one; implies --tls. Default: none."""

    client_key: Annotated[Path | None, Parameter(group=_CONNECTION, show_default=False)] = None
    """Its private key, PEM. Default: none."""


To = Annotated[Connection, Parameter(name="*")]
HERE = Connection()


@contextmanager
def connected(to: Connection) -> Iterator[grpc.Channel]:
    """A channel to a server; its errors become one line for the user."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    with _channel(to) as channel:
        try:
            yield grpc.intercept_channel(channel, _Shows(to.api_key)) if to.api_key else channel
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                hint = f"is a server running there?{_tls_hint(to)}"
                raise PerseidError(f"{to.server}: {error.details()}; {hint}") from error
            raise PerseidError(f"{error.code().name}: {error.details()}") from error
        except UnicodeEncodeError as error:
            raise PerseidError("an argument is not valid UTF-8") from error


def _channel(to: Connection) -> grpc.Channel:
    if to.api_key is not None and not (to.api_key.isascii() and to.api_key.isprintable()):
        raise InvalidRequest("--api-key: expected printable ASCII characters", field="api_key")
    if (to.client_cert is None) != (to.client_key is None):
        raise InvalidRequest("expected --client-cert and --client-key together", field="client_cert")
    if not to.tls and to.tls_ca is None and to.client_cert is None:
        return grpc.insecure_channel(to.server)
    read = {name: _read(name, path) for name, path in _files(to).items()}
    return grpc.secure_channel(
        to.server, grpc.ssl_channel_credentials(read["--tls-ca"], read["--client-key"], read["--client-cert"])
    )


def _tls_hint(to: Connection) -> str:
    encrypted = to.tls or to.tls_ca is not None or to.client_cert is not None
    return " And does it trust, and is it trusted by, these certificates?" if encrypted else ""


def _files(to: Connection) -> dict[str, Path | None]:
    return {"--tls-ca": to.tls_ca, "--client-cert": to.client_cert, "--client-key": to.client_key}


def _read(option: str, path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{option} {path}: {error.strerror}") from error


class _Details(NamedTuple):
    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


class _Shows(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Shows the key with every call."""

    def __init__(self, key: str) -> None:
        self._metadata = (("authorization", f"Bearer {key}"),)

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        """grpc."""
        return continuation(self._with_key(client_call_details), request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        """grpc."""
        return continuation(self._with_key(client_call_details), request)

    def _with_key(self, told: Any) -> _Details:
        metadata = (*(told.metadata or ()), *self._metadata)
        compression = getattr(told, "compression", None)
        return _Details(told.method, told.timeout, metadata, told.credentials, told.wait_for_ready, compression)

"""What `perseid serve` is told of keys and TLS, checked before anything is loaded, followed while it runs."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from perseid_server.access.exposure import check_exposure, is_loopback
from perseid_server.access.ledger import Ledger
from perseid_server.access.limits import Limiter
from perseid_server.access.periodically import Periodically
from perseid_server.access.watched import WatchedKeys
from perseid_server.api.tls import Tls, TlsFiles
from perseid_server.config import ServeConfig

logger = logging.getLogger(__name__)

USAGE_FILE = "key-usage.json"
"""In the store's folder, which one server uses at a time."""
_TLS_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True)
class Security:
    """None: without."""

    keys: WatchedKeys | None = None
    tls: Tls | None = None
    credentials: grpc.ServerCredentials | None = None


@contextmanager
def secured(config: ServeConfig) -> Iterator[Security]:
    """Read keys and certificates and follow their changes. InvalidRequest says what is wrong with them, or that the
    server would be open to strangers."""
    keys = WatchedKeys(config.api_keys) if config.api_keys is not None else None
    check_exposure(config.host, has_keys=keys is not None, insecure=config.insecure_listen)
    files = TlsFiles.of(config.tls_cert, config.tls_key, config.tls_client_ca)
    tls = Tls(files) if files is not None else None
    if keys is not None and tls is None and not is_loopback(config.host):
        logger.warning("API keys travel in plain text on %s; --tls-cert and --tls-key encrypt them", config.host)
    with ExitStack() as followed:
        if keys is not None:
            keys.start()
            followed.callback(keys.stop)
        if tls is not None:
            following = Periodically("reading the TLS certificate again", _TLS_INTERVAL_S, tls.refresh)
            following.start()
            followed.callback(following.stop)
        yield Security(keys, tls, tls.credentials() if tls is not None else None)


@contextmanager
def limited(store: Path) -> Iterator[Limiter]:
    """Limits of keys, with what was used of their quotas beside the store's adapters."""
    ledger = Ledger(store / USAGE_FILE)
    ledger.start()
    try:
        yield Limiter(ledger)
    finally:
        ledger.stop()

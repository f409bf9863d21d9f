"""What keeps a server from starting is one line, told before a model is loaded."""

import asyncio
import errno
import os
import re
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import fields, replace
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub.errors import XetDownloadError

from perseid_server.adapters.source import resolve_adapter
from perseid_server.adapters.store import AdapterStore
from perseid_server.cli.serve import _check_default, _client_policy, _default_store, _engine_config
from perseid_server.config import ServeConfig
from perseid_server.engine.config import EngineConfig
from perseid_server.errors import InvalidRequest
from tests.fake_hub import http_error
from tests.server.cli.running import Done, Perseid
from tests.server.stack import Stack, write_adapter


@pytest.fixture
def serve(perseid: Perseid, tmp_path: Path):
    def run(*arguments: str, **changes: str) -> Done:
        settings = {"http-port": "0", "grpc-port": "0", "store": str(tmp_path / "store")} | changes
        return perseid("serve", *arguments, *(part for name in settings for part in (f"--{name}", settings[name])))

    return run


def told(done: Done) -> str:
    """The one line; the exit status is that of an error."""
    assert done.status == 1
    assert done.err.count("\n") == 1
    return done.err


def test_every_setting_of_the_engine_reaches_it() -> None:
    """Each in turn has a value that is not the default."""
    shared = {field.name for field in fields(EngineConfig)} & {field.name for field in fields(ServeConfig)}
    assert "cuda_graphs" in shared
    for name in shared:
        default = getattr(ServeConfig(), name)
        other = not default if isinstance(default, bool) else "other" if isinstance(default, str) else 7
        assert getattr(_engine_config(replace(ServeConfig(), **{name: other})), name) == other, name


def test_a_taken_port(serve) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"HTTP cannot listen on 127.0.0.1:{port}" in told(serve(**{"http-port": str(port)}))
        assert f"gRPC cannot listen on 127.0.0.1:{port}" in told(serve(**{"grpc-port": str(port)}))


def test_a_host_that_is_not_ours(serve) -> None:
    assert "HTTP cannot listen on 203.0.113.1:0" in told(serve("--host", "203.0.113.1", "--insecure-listen"))


def test_an_adapter_without_a_source(serve) -> None:
    assert "--adapter: expected NAME=SOURCE, got 'x'" in told(serve("--adapter", "x"))


async def test_a_default_gate_set_has_to_be_loaded(stack: Stack) -> None:
    await stack.load("a")
    await stack.load_gates("g", "a")
    _check_default(stack.registry, None)
    _check_default(stack.registry, "g")
    for name in ("a", "nobody"):
        with pytest.raises(InvalidRequest, match=f"--gate-set {name}: no such gate set is loaded .loaded: 'g'"):
            _check_default(stack.registry, name)


def test_a_model_that_is_not_there(serve, tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in told(serve("--model", str(tmp_path / "nowhere")))


def test_clients_may_name_a_root_as_the_operator_did_though_it_is_a_link(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "real" / "one")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    policy = _client_policy(ServeConfig(adapter_root=(tmp_path / "link",)))
    for named in (tmp_path / "link" / "one", folder, "one"):
        assert resolve_adapter(str(named), policy).path == folder


def test_each_base_has_a_store_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    stores = {_default_store(base) for base in ("llama", "qwen", "../qwen", "a/b")}
    assert len(stores) == 4
    assert all(store.parent == tmp_path / "perseid" / "stores" for store in stores)


def test_a_store_another_server_uses(serve, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    assert "is in use by another server" in told(serve())
    store.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_model_loads_ends_the_start(
    serve, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    closed = []

    @asynccontextmanager
    async def endless(_: ServeConfig) -> AsyncIterator[None]:
        try:
            os.kill(os.getpid(), number)
            await asyncio.Event().wait()
            yield
        finally:
            closed.append(True)

    monkeypatch.setattr("perseid_server.cli.serve._server", endless)
    assert serve() == Done(0, "", "")
    assert closed == [True]


def test_a_store_that_cannot_be_made(serve, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "--store" in told(serve(store=str(tmp_path / "file" / "store")))


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (http_error("ReadError"), r"cannot be reached \(ReadError\)"),
        (http_error("ProxyError"), "cannot be reached"),
        (XetDownloadError("https://cas.example/x?signature=secret"), r"cannot be reached \(XetDownloadError\)"),
        (RuntimeError("hf_secret"), "cannot be reached"),
        (OSError(errno.ENOSPC, "no", "/home/operator/x"), "cannot be written: No space left on device"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_hub_that_fails_is_told_without_secrets(
    serve, monkeypatch: pytest.MonkeyPatch, raised: Exception, message: str
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=raised))
    line = told(serve(model="org/name"))
    assert re.fullmatch(rf"perseid: model org/name: .*{message}.*\n", line)
    assert not re.search("secret|/home|https:", line)

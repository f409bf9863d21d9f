"""`perseid serve` with mutual TLS and keys, real processes and the real base: every client of ours, and wrong ones."""

import re
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import httpx
import pytest
import trustme

from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from perseid_server.access.key_edit import add_key
from tests.e2e.client import TIMEOUT_S, Job, tokens_of
from tests.e2e.running import START_TIMEOUT_S, RunningServer, start_server, stop_server
from tests.server.cli.running import Perseid

PROMPT = "Once upon a time"


@dataclass
class Guarded:
    """A server that trusts one authority's clients, and what a client of it needs."""

    process: RunningServer
    folder: Path
    secret: str
    authority: trustme.CA = field(default_factory=trustme.CA)

    def address(self, pattern: str) -> str:
        """Where it says that it listens."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self.process.process.poll() is None:
            for line in list(self.process.lines):
                if match := re.match(rf"\s*{pattern}", line):
                    return match[1]
            time.sleep(0.05)
        raise TimeoutError("".join(self.process.lines[-40:]))

    @property
    def url(self) -> str:
        return self.address(r"HTTP\s+(https://\S+)")

    @property
    def target(self) -> str:
        return self.address(r"gRPC\s+(\S+)")

    def issue(self, name: str, *identities: str) -> None:
        """A certificate and its key, NAME.pem and NAME.key, put there whole."""
        made = self.authority.issue_cert(*identities)
        made.cert_chain_pems[0].write_to_path(self.folder / "new.pem")
        made.private_key_pem.write_to_path(self.folder / f"{name}.key")
        (self.folder / "new.pem").rename(self.folder / f"{name}.pem")

    def context(self, client: str | None = "client") -> ssl.SSLContext:
        made = ssl.create_default_context(cafile=self.folder / "ca.pem")
        if client is not None:
            made.load_cert_chain(self.folder / f"{client}.pem", self.folder / f"{client}.key")
        return made

    def channel(self, client: str | None = "client") -> grpc.Channel:
        pair = [None, None] if client is None else [self.folder / f"{client}.key", self.folder / f"{client}.pem"]
        read = [path.read_bytes() if path is not None else None for path in (self.folder / "ca.pem", *pair)]
        return grpc.secure_channel(self.target, grpc.ssl_channel_credentials(*read))

    def over_http(self, client: str | None = "client") -> str:
        body = {"model": "base", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
        headers = {"Authorization": f"Bearer {self.secret}"}
        with httpx.Client(base_url=self.url, verify=self.context(client), timeout=TIMEOUT_S) as http:
            model = http.get("/v1/models", headers=headers).json()["data"][0]["id"]
            told = http.post("/v1/completions", json=body | {"model": model}, headers=headers)
        assert told.status_code == 200, told.text
        return told.json()["choices"][0]["text"]

    def over_grpc(self, client: str | None = "client") -> tuple[int, ...]:
        metadata = (("authorization", f"Bearer {self.secret}"),)
        with self.channel(client) as channel:
            asked = Job((1, 2, 3), None, 8).message()
            return tokens_of(stubs.GenerationStub(channel).Generate(asked, metadata=metadata, timeout=TIMEOUT_S))


@pytest.fixture(scope="module")
def guarded(base_gguf: Path, adapter_folders: dict[str, Path], tmp_path_factory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("tls")
    secret = add_key(folder / "keys.toml", "all", {"roles": ["generate", "admin"]})
    authority = trustme.CA()
    made = Guarded(RunningServer(None, folder / "store"), folder, secret, authority)
    authority.cert_pem.write_to_path(folder / "ca.pem")
    authority.cert_pem.write_to_path(folder / "clients.pem")
    made.issue("server", "127.0.0.1")
    made.issue("client", "client@example.com")
    made.process = start_server(
        f"--tls-cert={folder / 'server.pem'}", f"--tls-key={folder / 'server.key'}",
        f"--tls-client-ca={folder / 'clients.pem'}", f"--api-keys={folder / 'keys.toml'}",
        f"--adapter-root={next(iter(adapter_folders.values())).parent}",
        store=folder / "store",
    )  # fmt: skip
    try:
        yield made
        assert "Traceback" not in "".join(made.process.lines)
    finally:
        status = stop_server(made.process)
    assert status == 0


def test_both_transports_generate(guarded: Guarded) -> None:
    assert guarded.over_http()
    assert len(guarded.over_grpc()) == 8


def test_our_own_commands(guarded: Guarded, adapter_folders: dict[str, Path], monkeypatch, capsys) -> None:
    perseid, folder = Perseid(monkeypatch, capsys), guarded.folder
    to = ("--server", guarded.target, f"--tls-ca={folder / 'ca.pem'}", f"--client-cert={folder / 'client.pem'}",
          f"--client-key={folder / 'client.key'}", f"--api-key={guarded.secret}")  # fmt: skip
    name, source = next(iter(adapter_folders.items()))
    for command in (
        ("adapters", "load", name, str(source)),
        ("adapters", "list"),
        ("generate", PROMPT, "--max-tokens", "4", "--adapter", name),
        ("adapters", "unload", name),
    ):
        done = perseid(*command, *to)
        assert done.status == 0, done.err


def refused(call: Callable[[], object]) -> None:
    with pytest.raises((httpx.TransportError, grpc.RpcError, ssl.SSLError)) as caught:
        call()
    if isinstance(caught.value, grpc.RpcError):
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_strangers_get_an_end_and_harm_nothing(guarded: Guarded) -> None:
    """Clients without a certificate, with one of another authority, and without TLS."""
    ours, guarded.authority = guarded.authority, trustme.CA()
    guarded.issue("stranger", "client@example.com")
    guarded.authority = ours
    for client in (None, "stranger"):
        refused(lambda client=client: guarded.over_http(client))
        refused(lambda client=client: guarded.over_grpc(client))
    refused(lambda: httpx.get(guarded.url.replace("https:", "http:") + "/health", timeout=TIMEOUT_S))
    with grpc.insecure_channel(guarded.target) as channel:
        refused(lambda: stubs.GenerationStub(channel).Generate(Job((1,), None, 1).message(), timeout=TIMEOUT_S))
    assert guarded.over_http()
    assert guarded.over_grpc()


def test_a_certificate_that_is_replaced_is_shown_to_the_next_client(guarded: Guarded) -> None:
    """By another authority: who trusts the old one alone finds out when it is there. Clients stay whose they were."""
    guarded.issue("before", "client@example.com")
    guarded.authority = trustme.CA()
    guarded.authority.cert_pem.write_to_path(guarded.folder / "ca.pem")
    guarded.issue("server", "127.0.0.1")
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            assert guarded.over_http("before")
            break
        except httpx.ConnectError:
            assert time.monotonic() < deadline
    assert guarded.over_grpc("before")

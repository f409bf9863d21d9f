"""Servers with a private authority, and such that ask for a certificate: answers and /metrics are both read."""

import itertools
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from perseid_protos.perseid.v1 import adapter_admin_pb2 as admin
from perseid_protos.perseid.v1 import adapter_admin_pb2_grpc as admin_stubs
from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from tests.server.cli.running import Perseid

ANSWER = json.dumps({"choices": [{"text": "abc"}], "usage": {"prompt_tokens": 3, "completion_tokens": 3}})
SHORT = ("--requests", "3", "--warm-up", "0", "--no-stream")


@dataclass(frozen=True)
class Files:
    """An authority, and what it has signed: a client's certificate with its key."""

    folder: Path
    authority: trustme.CA = field(default_factory=trustme.CA)

    def __post_init__(self) -> None:
        client = self.authority.issue_cert("client@example.com")
        self.authority.cert_pem.write_to_path(self.ca)
        client.cert_chain_pems[0].write_to_path(self.cert)
        client.private_key_pem.write_to_path(self.key)

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def cert(self) -> Path:
        return self.folder / "client.pem"

    @property
    def key(self) -> Path:
        return self.folder / "client.key"

    @property
    def trusted(self) -> tuple[str, ...]:
        return ("--ca", str(self.ca))

    @property
    def shown(self) -> tuple[str, ...]:
        return ("--client-cert", str(self.cert), "--client-key", str(self.key))


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


class Web:
    """An HTTP server; each scrape has 10 tokens more. It asks clients for a certificate where it shall."""

    def __init__(self, files: Files, *, asks: bool) -> None:
        self.keys: dict[str, set[str | None]] = {}  # by path
        context, scrapes, keys = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), itertools.count(1), self.keys
        files.authority.issue_cert("127.0.0.1").configure_cert(context)
        if asks:
            context.load_verify_locations(files.ca)
            context.verify_mode = ssl.CERT_REQUIRED

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self._say(f"vllm:generation_tokens_total {10 * next(scrapes)}\n" if self.path == "/metrics" else "{}")

            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                self._say(ANSWER)

            def _say(self, text: str):
                keys.setdefault(self.path, set()).add(self.headers.get("Authorization"))
                self.send_response(200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        self._listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._listening.socket = context.wrap_socket(self._listening.socket, server_side=True)
        self._thread = threading.Thread(target=self._listening.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"https://127.0.0.1:{self._listening.server_port}"

    def stop(self) -> None:
        self._listening.shutdown()
        self._thread.join()
        self._listening.server_close()


@pytest.fixture
def web(files: Files) -> Iterator[Callable[[bool], Web]]:
    """Starts one."""
    started: list[Web] = []

    def start(asks: bool) -> Web:
        started.append(Web(files, asks=asks))
        return started[-1]

    yield start
    for one in started:
        one.stop()


class Generation(stubs.GenerationServicer):
    def Generate(self, request, context):
        return pb.GenerateResponse(choices=[pb.Choice(token_ids=[1, 2, 3])], usage=pb.Usage(prompt_tokens=3))


class Admin(admin_stubs.AdapterAdminServicer):
    def ListAdapters(self, request, context):
        return admin.ListAdaptersResponse()


@pytest.fixture
def grpcs(files: Files) -> Iterator[str]:
    """A gRPC server that asks clients for a certificate."""
    own = files.authority.issue_cert("127.0.0.1")
    pair = (own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes())
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        stubs.add_GenerationServicer_to_server(Generation(), server)
        admin_stubs.add_AdapterAdminServicer_to_server(Admin(), server)
        credentials = grpc.ssl_server_credentials([pair], files.ca.read_bytes(), require_client_auth=True)
        port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        yield f"grpcs://127.0.0.1:{port}"
        server.stop(None).wait()


def run(perseid: Perseid, files: Files, *arguments: str) -> dict:
    """The summary of a run that succeeds."""
    done = perseid("loadtest", *arguments, *files.trusted, *SHORT, "--json", str(files.folder / "run.json"))
    assert (done.status, done.err) == (0, "")
    assert "No figures by the server" not in done.out
    return json.loads((files.folder / "run.json").read_text())["summary"]


def test_the_servers_own_figures_come_over_tls(perseid: Perseid, files: Files, web):
    summary = run(perseid, files, "--target", web(False).url, "--model", "m")
    assert (summary["answered"], summary["server"]["generation_tokens"]) == (3, 10.0)


def test_a_server_that_asks_for_a_certificate_gets_it_with_answers_and_metrics(perseid: Perseid, files: Files, web):
    summary = run(perseid, files, "--target", web(True).url, "--model", "m", *files.shown)
    assert (summary["answered"], summary["server"]["generation_tokens"]) == (3, 10.0)


def test_over_grpc_too_and_with_metrics_elsewhere(perseid: Perseid, files: Files, grpcs: str, web):
    summary = run(perseid, files, "--target", grpcs, "--metrics", web(True).url, *files.shown)
    assert (summary["answered"], summary["output_tokens"], summary["server"]["generation_tokens"]) == (
        3,
        9,
        20.0 - 10.0,
    )


def test_without_a_certificate_such_servers_do_not_answer(perseid: Perseid, files: Files, grpcs: str, web):
    for target in (web(True).url, grpcs):
        done = perseid("loadtest", "--target", target, "--model", "m", *files.trusted, *SHORT)
        assert (done.status, done.out, done.err.count("\n")) == (1, "", 1)
        assert "is it trusted by, these certificates?" in done.err


def test_metrics_that_ask_for_a_certificate_end_it_before_the_run(perseid: Perseid, files: Files, web):
    target, metrics = web(False).url, web(True).url
    done = perseid("loadtest", "--target", target, "--model", "m", *files.trusted, "--metrics", metrics, *SHORT)
    assert (done.status, done.out, done.err.count("\n")) == (1, "", 1)
    assert done.err.startswith(f"perseid: --metrics: {metrics}/metrics: ")  # then how soon the end was seen


@pytest.mark.parametrize("checked_before", [False, True])
@pytest.mark.parametrize(
    ("given", "key"),
    [
        (("--api-key", "user"), "user"),
        (("--api-key", "user", "--metrics-key", "operator"), "operator"),
        (("--api-key", "user", "--metrics-key", ""), "user"),
    ],
)
def test_metrics_are_read_with_their_own_key(perseid: Perseid, files: Files, web, given, key, checked_before):
    server = web(False)
    more = ("--metrics", server.url) if checked_before else ()
    run(perseid, files, "--target", server.url, "--model", "m", *given, *more)
    assert server.keys["/metrics"] == {f"Bearer {key}"}
    assert server.keys["/v1/completions"] == {"Bearer user"}
    assert "operator" not in (files.folder / "run.json").read_text()


def test_the_metrics_key_is_read_from_the_environment(perseid: Perseid, files: Files, web, monkeypatch):
    server = web(False)
    monkeypatch.setenv("PERSEID_METRICS_KEY", "operator")
    run(perseid, files, "--target", server.url, "--model", "m")
    assert (server.keys["/metrics"], server.keys["/v1/completions"]) == ({"Bearer operator"}, {None})


def encrypt(files: Files) -> None:
    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    files.key.write_bytes(key.private_bytes(encoding, form, serialization.BestAvailableEncryption(b"x")))


BROKEN: dict[str, tuple[Callable[[Files], object], str]] = {
    "authority not PEM": (lambda files: files.ca.write_text("x"), "--ca: {ca}: not a PEM file with certificates"),
    "not PEM": (lambda files: files.cert.write_text("x"), "--client-cert: {cert}: not a PEM file with a certificate"),
    "key not PEM": (lambda files: files.key.write_text(""), "--client-key: {key}: not a PEM file with a private key"),
    "a certificate as key": (
        lambda files: files.key.write_bytes(files.cert.read_bytes()),
        "--client-key: {key}: not a PEM file with a private key",
    ),
    "another's key": (
        lambda files: trustme.CA().issue_cert("x").private_key_pem.write_to_path(files.key),
        "--client-key: {key}: it does not belong to the certificate {cert}",
    ),
    "a password": (encrypt, "--client-key: {key}: it has a password; expected a key without one"),
}


@pytest.mark.parametrize("scheme", ["https", "grpcs"])
@pytest.mark.parametrize("case", BROKEN)
def test_files_that_cannot_be_used_are_told_before_the_run(perseid: Perseid, files: Files, case: str, scheme: str):
    harm, told = BROKEN[case]
    harm(files)
    done = perseid("loadtest", "--target", f"{scheme}://127.0.0.1:1", *files.trusted, *files.shown)
    assert (done.status, done.out) == (1, "")
    assert done.err == f"perseid: {told.format(ca=files.ca, cert=files.cert, key=files.key)}\n"

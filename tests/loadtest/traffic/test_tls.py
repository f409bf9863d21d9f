"""A server with a private authority: its answers and its /metrics are both read by --ca."""

import itertools
import json
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import trustme

from tests.server.cli.running import Perseid

ANSWER = json.dumps({"choices": [{"text": "abc"}], "usage": {"prompt_tokens": 3, "completion_tokens": 3}})


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """Its certificates are in ca.pem; each scrape has 10 tokens more."""
    authority, serving = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    authority.issue_cert("127.0.0.1").configure_cert(serving)
    scrapes = itertools.count(1)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._say(f"vllm:generation_tokens_total {10 * next(scrapes)}\n" if self.path == "/metrics" else "{}")

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self._say(ANSWER)

        def _say(self, text: str):
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.socket = serving.wrap_socket(listening.socket, server_side=True)
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"https://127.0.0.1:{listening.server_port}"
    listening.shutdown()
    thread.join()
    listening.server_close()


def test_the_servers_own_figures_come_over_tls(perseid: Perseid, tmp_path: Path, url: str):
    arguments = ["--target", url, "--ca", str(tmp_path / "ca.pem"), "--model", "m", "--no-stream"]
    length = ["--requests", "3", "--warm-up", "0", "--json", str(tmp_path / "run.json")]
    done = perseid("loadtest", *arguments, *length)
    assert (done.status, done.err) == (0, "")
    assert "No figures by the server" not in done.out
    summary = json.loads((tmp_path / "run.json").read_text())["summary"]
    assert (summary["answered"], summary["server"]["generation_tokens"]) == (3, 10.0)

"""The evaluation's way to a server: a stand-in that knows every truth under an adapter's name only."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import evaluate
import httpx
import pytest
import serving
from tasks import TASKS

ADAPTERS = Path(__file__).parents[2] / "examples" / "adapters"
STAND_IN = """
import http.server, pathlib, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/ready" else 404)
        self.end_headers()

pathlib.Path(__file__).with_name("arguments").write_text(" ".join(sys.argv[1:]))
if "nowhere.gguf" in sys.argv:
    sys.exit("no such adapter")
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print(f"listening on http://127.0.0.1:{server.server_port}")
server.serve_forever()
"""


class Oracle(BaseHTTPRequestHandler):
    """Answers with the truth where the model is the task's adapter, and in a sentence otherwise."""

    def do_GET(self):
        self.reply({"object": "list", "data": [{"id": "base"}, *({"id": name} for name in TASKS)]})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert request["temperature"] == 0
        [message] = request["messages"]
        items = TASKS[request["model"]].splits.held_out if request["model"] in TASKS else ()
        truths = {item.question: item.answer for item in items}
        content = truths.get(message["content"], "I do not know.")
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": content},
        }
        self.reply({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})

    def reply(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


class OracleServer(ThreadingHTTPServer):
    request_queue_size = 64


@pytest.fixture
def oracle():
    server = OracleServer(("127.0.0.1", 0), Oracle)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A perseid_server that only gets ready."""
    package = tmp_path / "perseid_server"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return package


def test_scores_through_a_server(oracle):
    result = evaluate.evaluate(ADAPTERS / "iso-date", serving.Server(oracle))
    assert (result.base, result.adapter) == (0, 100)
    assert result.passes()


def test_main_prints_the_table_and_writes_the_results(oracle, tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--url", oracle, "--task", "iso-date", "--out", str(out)])
    assert evaluate.main() == 0
    assert "iso-date" in capsys.readouterr().out
    [row] = json.loads(out.read_text())["results"]
    assert (row["task"], row["rank"], row["adapter"]) == ("iso-date", 12, 100)


@pytest.mark.parametrize(("base", "adapter", "passes"), [(20, 80, True), (21, 100, False), (0, 79, False)])
def test_the_mark(base, adapter, passes):
    row = evaluate.Result("t", "", rank=1, targets="", megabytes=1, base=base, adapter=adapter)
    assert row.passes() is passes


def test_own_server_starts_and_ends(stand_in):
    with serving.own_server([ADAPTERS / "iso-date"], base=None) as url:
        assert httpx.get(f"{url}/ready").status_code == 200
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/ready")
    words, store = (stand_in / "arguments").read_text().split(" --store ")
    assert words == f"serve --http-port 0 --grpc-port 0 --adapter iso-date={ADAPTERS / 'iso-date'}"
    assert not Path(store).exists()


def test_own_server_tells_why_it_failed(stand_in):
    with pytest.raises(SystemExit, match="no such adapter"), serving.own_server([], base=Path("nowhere.gguf")):
        pass

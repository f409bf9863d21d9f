"""What a request to a server carries, and what comes back beside the text."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from serving import Reply, Server


class Echo(BaseHTTPRequestHandler):
    """Answers with the question, and tells the rest of the request under `perseid`."""

    def do_GET(self):
        self.reply({"object": "list", "data": [{"id": "the-base"}, {"id": "an-adapter"}]})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        [message] = request.pop("messages")
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": message["content"]}}
        told = {} if request["model"] == "silent" else {"perseid": request}
        body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        self.reply(body | told)

    def reply(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    http = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield Server(f"http://127.0.0.1:{http.server_port}/")
    http.shutdown()
    thread.join()
    http.server_close()


def test_without_a_model_the_base_is_asked(server):
    [reply] = server.ask(["why?"], 7)
    assert reply.text == "why?"
    assert reply.told == {"model": "the-base", "max_tokens": 7, "temperature": 0}


def test_more_fields_of_the_body(server):
    replies = server.ask(["a", "b", "c"], 1, "auto", {"auto": {"k": 1}, "routing": "summary"})
    assert [reply.text for reply in replies] == ["a", "b", "c"]
    told = replies[0].told
    assert (told["model"], told["auto"], told["routing"]) == ("auto", {"k": 1}, "summary")


def test_other_servers_tell_nothing(server):
    assert server.ask(["a"], 1, "silent") == [Reply("a", {})]

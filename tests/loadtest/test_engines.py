"""How engines are asked: adapters by model or by llama-server's numbers, and a process that answers lines."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from perseid_loadtest.engines import ByLoraField, ByModel, OpenAIEngine, discover, lora_numbers
from perseid_loadtest.lines import line_engine
from perseid_loadtest.workload import Case, Workload

WORKLOAD = Workload(prompt=8, tokens=4, adapters=("sql", "dates"))


def test_by_model_the_base_has_its_own_name():
    dialect = ByModel("base", frozenset({"base", "sql"}))
    assert dialect.fields("") == {"model": "base"}
    assert dialect.fields("sql") == {"model": "sql"}


def test_by_lora_field_every_adapter_gets_a_scale():
    """llama-server takes an empty list for all adapters at once."""
    dialect = ByLoraField("base", {"sql": 0, "dates": 1}, (0, 1, 2))
    assert dialect.fields("")["lora"] == [{"id": number, "scale": 0.0} for number in range(3)]
    assert dialect.fields("dates")["lora"] == [
        {"id": 0, "scale": 0.0},
        {"id": 1, "scale": 1.0},
        {"id": 2, "scale": 0.0},
    ]


def test_a_llama_server_without_adapters_is_told_of_none():
    assert "lora" not in ByLoraField("base", {}, ()).fields("")


def test_files_are_found_by_the_adapters_name():
    listed = [{"id": 0, "path": "/x/lora-dates.gguf"}, {"id": 1, "path": "sql.gguf"}, {"id": 2, "path": "other.gguf"}]
    assert lora_numbers(listed, ("sql", "dates", "missing")) == {"sql": 1, "dates": 0}


def test_a_name_inside_another_is_not_mistaken():
    listed = [{"id": 0, "path": "sql.gguf"}, {"id": 1, "path": "my-sql.gguf"}]
    assert lora_numbers(listed, ("sql", "my-sql")) == {"sql": 0, "my-sql": 1}


@pytest.mark.parametrize(
    ("names", "can"),
    [({"base"}, {"base"}), ({"base", "sql"}, {"base", "one"}), ({"base", "sql", "dates"}, {"base", "one", "mixed"})],
)
def test_a_peer_does_what_it_has_adapters_for(names, can):
    engine = OpenAIEngine("peer", "http://127.0.0.1:1", ByModel("base", frozenset(names)), WORKLOAD)
    assert {kind for kind in ("base", "one", "mixed") if engine.can(Case(kind, 4))} == can


def test_the_body_asks_for_exactly_so_many_greedy_tokens():
    engine = OpenAIEngine("peer", "http://127.0.0.1:1", ByModel("base", frozenset()), WORKLOAD)
    [job] = WORKLOAD.jobs(Case("base", 1), 0)
    body = engine.body(job)
    assert body["prompt"] == list(job.prompt)
    assert (body["max_tokens"], body["temperature"], body["ignore_eos"], body["stream"]) == (4, 0, True, True)


@pytest.fixture
def server():
    """Serves the JSON of `answers`; 404 for the rest."""
    answers = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path in answers else 404)
            self.end_headers()
            self.wfile.write(json.dumps(answers.get(self.path)).encode())

        def log_message(self, *_):
            pass

    listening = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{listening.server_port}", answers
    listening.shutdown()
    thread.join()
    listening.server_close()


def test_discovering_a_server_that_lists_models(server):
    url, answers = server
    answers["/v1/models"] = {"data": [{"id": "base"}, {"id": "sql"}]}
    assert discover(url, ("sql",)) == ByModel("base", frozenset({"base", "sql"}))
    assert discover(url, ("sql",), base="other").fields("") == {"model": "other"}


def test_discovering_llama_server(server):
    url, answers = server
    answers["/v1/models"] = {"data": [{"id": "base.gguf"}]}
    answers["/lora-adapters"] = [{"id": 3, "path": "a/sql.gguf", "scale": 1.0}]
    assert discover(url, ("sql", "dates")) == ByLoraField("base.gguf", {"sql": 3}, (3,))


@pytest.mark.parametrize("told", [{}, [], [{"id": 0}]])
def test_another_server_may_answer_anything_there(server, told):
    url, answers = server
    answers["/v1/models"] = {"data": [{"id": "base"}]}
    answers["/lora-adapters"] = told
    assert discover(url, ()) == ByModel("base", frozenset({"base"}))


def test_discovering_llama_server_without_adapters(server):
    url, answers = server
    answers["/v1/models"] = {"data": [{"id": "base.gguf", "owned_by": "llamacpp"}]}
    answers["/lora-adapters"] = []
    assert discover(url, ("sql",)) == ByLoraField("base.gguf", {}, ())


def test_a_peer_that_is_not_there_is_named():
    with pytest.raises(RuntimeError, match=r"127\.0\.0\.1:1: no server answers"):
        discover("http://127.0.0.1:1", ())


PROCESS = """
from perseid_loadtest.lines import serve
print("loading, please wait")
serve(lambda case, turn: 100.0 * case.batch + turn)
"""


def test_a_process_answers_cases_line_by_line(tmp_path, monkeypatch):
    (tmp_path / "stand_in.py").write_text(PROCESS)
    monkeypatch.setenv("PYTHONPATH", ":".join([str(tmp_path), *filter(None, sys.path)]))
    with line_engine("stand-in", "stand_in", [], [Case("one", 4)]) as engine:
        assert engine.can(Case("one", 4))
        assert not engine.can(Case("base", 4))
        assert engine.rate(Case("one", 4), 7) == 407.0
        assert engine.rate(Case("mixed", 2), 1) == 201.0


def test_a_process_that_ends_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "stand_in.py").write_text("raise SystemExit(3)")
    monkeypatch.setenv("PYTHONPATH", ":".join([str(tmp_path), *filter(None, sys.path)]))
    with pytest.raises(RuntimeError, match="stand-in: the process ended"), line_engine("stand-in", "stand_in", [], []):
        pass

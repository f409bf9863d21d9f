"""A call is closed once, with what became of it."""

import logging
import time

import pytest

from perseid_server.observe.calls import Calls
from perseid_server.observe.record import AnswerRecord, CallRecord, GenerationRecord, current_call, recording


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    return [record.fields for record in caplog.records if record.name == "perseid_server.calls"]


@pytest.fixture(autouse=True)
def level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def test_a_call_is_closed_once(caplog) -> None:
    calls = Calls()
    one, other = calls.open("http", "GET /a", {}), calls.open("grpc", "b", {})
    assert list(calls.open_calls) == [one, other]
    calls.close(one)
    calls.close(one)
    assert list(calls.open_calls) == [other]
    assert [line["route"] for line in lines(caplog)] == ["GET /a"]


@pytest.mark.parametrize(("stated", "is_kept"), [("a-1", True), ("x" * 128, True), ("x" * 129, False), ("a b", False),
                                                 ("a\n", False), ("é", False), ("", False)])  # fmt: skip
def test_a_clients_id_is_kept_where_it_fits(stated: str, is_kept: bool) -> None:
    found = Calls().open("http", "GET /", {"x-request-id": stated}).request_id
    assert found == stated if is_kept else len(found) == 32


def test_who_listens_adds_to_the_line_and_cannot_break_it(caplog) -> None:
    calls = Calls(on_close=lambda call: {"trace_id": call.route})
    calls.close(calls.open("http", "GET /a", {}))
    assert lines(caplog)[0]["trace_id"] == "GET /a"
    broken = Calls(on_close=lambda call: {"x": 1 / 0})
    broken.close(broken.open("http", "GET /b", {}))
    assert "could not be told" in caplog.text
    assert [line["route"] for line in lines(caplog)] == ["GET /a", "GET /b"]


def test_the_first_reason_counts() -> None:
    call = CallRecord()
    call.failed(ZeroDivisionError())
    call.refused("other", "field")
    assert (call.error, call.error_field) == ("internal", None)


def test_figures_are_of_all_answers_together() -> None:
    call = CallRecord(arrived=100.0)
    first, second = GenerationRecord(prompt_tokens=3), GenerationRecord(prompt_tokens=4)
    call.generations += [first, second]
    for generation, first_at, queue_s, reason in ((first, 103.0, 1.0, "stop"), (second, 102.0, 2.0, "length")):
        generation.answers.append(AnswerRecord(100.5, first_at, 110.0, 5, queue_s, finish_reason=reason))
    second.answer()  # nothing has come of that
    call.ended = 111.0
    assert (call.prompt_tokens, call.generated_tokens) == (7, 10)
    assert (call.ttft_s, call.queue_s, call.duration_s) == (2.0, 2.0, 11.0)
    assert call.finish_reasons == ("stop", "length")


def test_the_first_output_tells_the_times() -> None:
    answer, before = AnswerRecord(), time.monotonic()
    answer.saw(1, 0.5, 0.25, 0.125)
    answer.saw(2, None, None, None)
    assert (answer.queue_s, answer.prefill_s, answer.load_s, answer.num_tokens) == (0.5, 0.25, 0.125, 3)
    assert answer.first is not None
    assert answer.last is not None
    assert before <= answer.first <= answer.last


def test_code_runs_for_its_call() -> None:
    call = CallRecord()
    with recording(call):
        assert current_call() is call
    assert current_call() is not call
    assert current_call() is not current_call()  # nothing is kept of what nobody reads

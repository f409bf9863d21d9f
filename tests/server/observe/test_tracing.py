"""A call that is over becomes spans: their order, their times, whose trace they belong to."""

import logging
import socket
import time

import pytest

from perseid_server.observe import tracing
from perseid_server.observe.calls import Calls
from perseid_server.observe.record import AnswerRecord, CallRecord, GenerationRecord
from perseid_server.observe.tracing import Tracing
from tests.server.observe.collector import Collector, collecting

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HOSTILE = "x\n\x1b[31m é \ud800"


@pytest.fixture
def collector():
    with collecting() as found:
        yield found


def closed(collector: Collector, *, sample: float = 1.0, fill=lambda _: None, **headers: str) -> list[dict]:
    """A call that `fill` writes something into, closed and sent; what its log line says of it."""
    sending, told = Tracing(collector.endpoint, sample), []
    calls = Calls(on_close=lambda call: told.append(sending.tell(call)) or told[-1])
    call = calls.open("http", "POST /v1/completions", headers)
    fill(call)
    calls.close(call)
    sending.stop()
    return told


def answered(call: CallRecord) -> None:
    """Arrived 10 s ago; the engine had it 1 s later, then 4 s of queue, 2 of them for an adapter, 1 of prefill, 3 of
    decode."""
    now = time.monotonic()
    call.arrived = now - 10
    call.status = 200
    record = GenerationRecord("cmpl-1", "chat", "tiny", "one", "one@abc", prompt_tokens=7, settings={"seed": 1 << 64})
    record.answers.append(AnswerRecord(now - 9, now - 4, now - 1, 5, 4.0, 2.0, 1.0, "stop"))
    call.generations.append(record)


def test_queue_load_prefill_and_decode_follow_each_other(collector: Collector) -> None:
    closed(collector, fill=answered)
    assert collector.tree() == {
        "POST /v1/completions": ["queue", "prefill", "decode"], "queue": ["adapter load"], "adapter load": [],
        "prefill": [], "decode": [],
    }  # fmt: skip
    call = collector.named("POST /v1/completions")
    spans = {span.name: (span.start - call.start, span.end - call.start) for span in collector.spans}
    seconds = {name: tuple(round(at / 1e9, 3) for at in span) for name, span in spans.items()}
    assert seconds.pop("POST /v1/completions")[1] >= 9.999
    assert seconds == {"queue": (1, 5), "adapter load": (3, 5), "prefill": (5, 6), "decode": (6, 9)}
    assert abs(call.end - time.time_ns()) < 60e9
    assert len({span.trace for span in collector.spans}) == 1


def test_attributes_are_opentelemetrys(collector: Collector) -> None:
    closed(collector, fill=answered)
    call = collector.named("POST /v1/completions")
    told = dict(call.attributes)
    assert told.pop("gen_ai.response.time_to_first_chunk") == pytest.approx(6.0)
    assert len(told.pop("perseid.request_id")) == 32
    assert told == {
        "http.request.method": "POST", "http.route": "/v1/completions", "http.response.status_code": 200,
        "gen_ai.provider.name": "perseid", "gen_ai.operation.name": "chat", "gen_ai.request.model": "one",
        "gen_ai.response.model": "one@abc", "gen_ai.response.id": "cmpl-1", "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 7, "gen_ai.usage.output_tokens": 5, "gen_ai.usage.cache_read.input_tokens": 0,
    }  # fmt: skip
    assert call.resource["service.name"] == "perseid"
    assert not call.is_error


@pytest.mark.parametrize(("sample", "flag", "is_sent"), [(1.0, "00", False), (0.0, "01", True), (1.0, "01", True)])
def test_what_the_client_decided_holds(collector: Collector, sample: float, flag: str, is_sent: bool) -> None:
    told = closed(collector, sample=sample, fill=answered, traceparent=f"00-{TRACE}-{PARENT}-{flag}")
    assert told == [{"trace_id": TRACE}]
    if is_sent:
        call = collector.named("POST /v1/completions")
        assert (call.trace, call.parent) == (TRACE, PARENT)
    else:
        assert collector.spans == []


@pytest.mark.parametrize("header", ["nonsense", f"00-{TRACE}-{PARENT}", f"00-{'0' * 32}-{PARENT}-01", "00-" * 300])
def test_a_parent_that_is_none_is_ignored(collector: Collector, header: str) -> None:
    told = closed(collector, fill=answered, traceparent=header)
    call = collector.named("POST /v1/completions")
    assert call.parent == ""
    assert told == [{"trace_id": call.trace}]


def test_what_is_not_sampled_is_not_told(collector: Collector) -> None:
    assert closed(collector, sample=0.0, fill=answered) == [{}]
    assert collector.spans == []


def test_health_checks_are_not_traced(collector: Collector) -> None:
    def probe(call: CallRecord) -> None:
        call.is_probe = True

    assert closed(collector, fill=probe) == [{}]
    assert collector.spans == []


@pytest.mark.parametrize(("error", "is_error"), [("internal", True), ("unavailable", True), ("not_found", False)])
def test_only_our_own_faults_are_errors(collector: Collector, error: str, is_error: bool) -> None:
    closed(collector, fill=lambda call: call.refused(error))
    call = collector.named("POST /v1/completions")
    assert (call.is_error, call.attributes["error.type"]) == (is_error, error)


def test_an_answer_that_never_began(collector: Collector) -> None:
    def waiting(call: CallRecord) -> None:
        call.generations.append(GenerationRecord())
        call.generations[0].answer()

    closed(collector, fill=waiting)
    assert collector.tree()["POST /v1/completions"] == ["unanswered"]


def test_whatever_clients_name_can_be_sent(collector: Collector, caplog: pytest.LogCaptureFixture) -> None:
    def fill(call: CallRecord) -> None:
        call.route = f"GET {HOSTILE}"
        settings = {"seed": 10**6000, "top_p": float("nan")}
        call.generations.append(GenerationRecord(HOSTILE, model=HOSTILE * 1000, adapter=HOSTILE, settings=settings))

    closed(collector, fill=fill)
    (call,) = collector.spans
    assert call.attributes["gen_ai.request.model"].startswith("x\n\x1b[31m é ?")
    assert len(call.attributes["gen_ai.request.model"]) < 300
    assert "gen_ai.request.seed" not in call.attributes
    assert caplog.records == []  # no exporter complains


def test_many_answers_have_bounded_spans(collector: Collector) -> None:
    def many(call: CallRecord) -> None:
        answered(call)
        call.generations[0].answers *= 1000

    closed(collector, fill=many)
    assert sum(span.name == "decode" for span in collector.spans) == tracing.MOST_ANSWERS


def test_a_collector_that_is_down_holds_nobody_up(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.CRITICAL)
    monkeypatch.setattr(tracing, "STOP_TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never says a word
        sending = Tracing(f"http://127.0.0.1:{silent.getsockname()[1]}", 1.0)
        calls = Calls(on_close=sending.tell)
        for _ in range(5000):  # more than wait to be sent
            calls.close(calls.open("http", "GET /", {}))
        assert not calls.open_calls
        sending.stop()  # comes back

"""Log lines: a traceback tells where, and nothing of what clients sent; what clients sent breaks no line."""

import json
import logging
from collections.abc import Iterator
from typing import Literal

import pytest
import structlog

from perseid_server.logs import configure_logging
from perseid_server.observe.calls import Calls
from perseid_server.observe.record import GenerationRecord
from tests.server.stack import LiveStack

HOSTILE = "x\n2026-01-01 [info] forged \x1b[31m\r\x00\u2028\u202e status=200 é\ud800"


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", root.handlers)
    monkeypatch.setattr(root, "level", root.level)
    yield
    structlog.contextvars.clear_contextvars()


def call_with(name: str, **more: str) -> None:
    """A call whose every text is this one."""
    calls = Calls(log_prompts=True)
    call = calls.open("http", f"GET {name}", more)
    call.subject = call.error_field = call.key = name
    record = GenerationRecord(id=name, model=name, adapter=name, prompt=name, keeps_text=True)
    record.answer().texts = [name]
    call.generations.append(record)
    calls.close(call)


@pytest.mark.parametrize("style", ["human", "json"])
def test_a_traceback_shows_no_local_variables(capsys, style: Literal["human", "json"]) -> None:
    configure_logging("info", style)
    prompt = "a client's " + "secret"  # noqa: F841  a local variable of a frame in the traceback
    try:
        raise RuntimeError("it broke")  # noqa: TRY301
    except RuntimeError:
        logging.getLogger("perseid_server.test").exception("a call failed")
    told = capsys.readouterr().err
    assert "a call failed" in told
    assert "RuntimeError: it broke" in told
    assert "a client's secret" not in told


def test_a_call_is_one_object_for_machines(capsys) -> None:
    configure_logging("info", "json")
    call_with(HOSTILE)
    (line,) = capsys.readouterr().err.splitlines()
    told = json.loads(line)
    assert (told["event"], told["level"], told["logger"]) == ("call", "info", "perseid_server.calls")
    assert told["name"] == told["model"] == told["adapter"] == HOSTILE
    assert told["prompts"] == told["answers"] == [HOSTILE]
    assert told["duration_s"] >= 0


def test_a_call_is_one_line_for_people(capsys) -> None:
    configure_logging("info", "human")
    call_with(HOSTILE)
    (line,) = capsys.readouterr().err.split("\n")[:-1]
    assert line.isprintable()
    assert " model='x\\n2026" in line
    assert " status=" not in line.replace("status=200 ", "")  # only inside of quotes


def test_plain_names_are_not_quoted(capsys) -> None:
    configure_logging("info", "human")
    call_with("acme-7@0123abc")
    assert " model=acme-7@0123abc " in capsys.readouterr().err


def test_names_are_shortened(capsys) -> None:
    configure_logging("info", "json")
    call_with("x" * (1 << 20))
    (line,) = capsys.readouterr().err.splitlines()
    told = json.loads(line)
    assert told["model"] == "x" * 200 + f"… ({1 << 20} characters)"
    assert len(told["prompts"][0]) < 1 << 16


def test_an_event_of_several_lines_looks_like_no_other(capsys) -> None:
    configure_logging("info", "human")
    logging.getLogger("perseid_server.test").error("stacks:\nfirst\n\x1b[2Jsecond")
    told = capsys.readouterr().err
    assert "stacks:\n    first\n    \\x1b[2Jsecond" in told


def test_a_traceback_looks_like_no_other_line(capsys) -> None:
    configure_logging("info", "human")
    try:
        raise ExceptionGroup(HOSTILE, [ValueError(HOSTILE)])  # noqa: TRY301
    except ExceptionGroup:
        logging.getLogger("perseid_server.test").exception("a call failed")
    first, *others = capsys.readouterr().err.split("\n")[:-1]
    assert "a call failed" in first
    assert any("2026-01-01 [info] forged \\x1b" in line for line in others)
    assert all(line.isprintable() for line in others)
    assert all(line.startswith("    ") for line in others[1:])


async def test_a_bug_has_one_traceback_and_the_id_of_its_call(
    live: LiveStack, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(live.stack.service.text, "encode", broken)
    configure_logging("info", "json")
    async with live.http() as client:
        told = await client.post("/v1/completions", json={"model": "tiny", "prompt": "a"})
    assert told.status_code == 500
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    (line,) = [line for line in lines if "Traceback" in json.dumps(line)]
    assert line["request_id"] == told.headers["X-Request-Id"]


def test_other_lines_of_a_call_have_its_id(capsys) -> None:
    configure_logging("info", "json")
    Calls().open("http", "GET /", {"x-request-id": "mine"})
    logging.getLogger("perseid_server.test").warning("something")
    assert json.loads(capsys.readouterr().err)["request_id"] == "mine"

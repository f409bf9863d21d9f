"""A server to be attacked, and what must be true of it afterwards."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.fakes import expected
from tests.server.speculation.heads_folders import write_heads
from tests.server.stack import LiveStack, Stack, serving_in_thread, write_adapter, write_gate_set

PATIENCE_S = 60.0


class Complaints(logging.Handler):
    """What the server logs of its own mistakes: errors, and anything with a traceback."""

    def __init__(self) -> None:
        super().__init__(logging.NOTSET)
        self.told: list[str] = []
        self.setFormatter(logging.Formatter("%(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR or record.exc_info:
            self.told.append(self.format(record))


@contextmanager
def attacked_server(folder: Path) -> Iterator[LiveStack]:
    """Adapters `one` and `two`, the gate set `gates`, the heads `heads`; `sources` below the adapter root can be
    loaded. At the end all is as it was, and nothing was logged as an error."""
    complaints = Complaints()
    logging.getLogger().addHandler(complaints)
    try:
        with serving_in_thread(folder, "one", "two", prepare=_prepare) as live:
            yield live
            wait_until_calm(live)
            check_plain_answer(live)
            check_nothing_is_held(live)
    finally:
        logging.getLogger().removeHandler(complaints)
    assert not complaints.told, "\n".join(complaints.told[:3])


async def _prepare(stack: Stack) -> None:
    versions = {name: stack.registry.get(name).version for name in ("one", "two")}
    write_gate_set(stack.root / "gates", versions)
    write_heads(stack.root / "heads")
    write_adapter(stack.root / "source", seed=9)
    for name in ("gates", "heads"):
        await stack.registry.load(name, str(stack.root / name))


def wait_until_calm(live: LiveStack) -> None:
    """Until nothing runs: clients that left may be noticed a moment later. Who steps the fake engine is a request, so
    one more clears what was aborted."""
    deadline = time.monotonic() + PATIENCE_S
    admission = live.stack.service._admission
    while time.monotonic() < deadline and (admission.in_progress or live.stack.engine.engine.has_work):
        check_plain_answer(live)
        time.sleep(0.01)


def check_plain_answer(live: LiveStack) -> None:
    """A request as any other gets the answer that it would get alone, and so does one for an adapter."""
    one = live.stack.registry.find("one")
    for model, version in (("tiny", None), ("one", one.version if one else None)):
        if model == "one" and version is None:
            continue
        body = {"model": model, "prompt": "say", "max_tokens": 8, "temperature": 0}
        told = httpx.post(f"{live.url}/v1/completions", json=body, timeout=PATIENCE_S)
        assert told.status_code == 200, told.text
        assert told.json()["choices"][0]["text"] == bytes(expected(tuple(b"say"), version, 8)).decode()


def check_nothing_is_held(live: LiveStack) -> None:
    """Places in the queue, leases and KV blocks are back."""
    stack = live.stack
    admission, engine = stack.service._admission, stack.engine.engine
    assert (admission.in_progress, admission.tokens_in_progress) == (0, 0)
    assert stack.registry.leases.versions() == frozenset()
    assert engine._blocks.num_free == engine._blocks.num_blocks
    assert not engine.has_work
    assert not any(engine._residency.users.values())


def no_traceback(text: str) -> None:
    """What a client is told shows nothing of our insides."""
    for word in ("Traceback", "perseid_server", "perseid_router", 'File "', "site-packages", " object at 0x"):
        if word in text:
            pytest.fail(f"a client is told {word!r}: {text[:500]}")

"""What a key pays for a request that is not answered: nothing, over either way of answering."""

from typing import Any

import pytest

from perseid_server.access.keys import Allowance
from tests.server.access.rings import bearer, gate_of, key
from tests.server.stack import LiveStack, Stack, make_stack

BODY = {"model": "tiny", "prompt": "x" * 50, "max_tokens": 2}


@pytest.fixture
def stack(tmp_path) -> Stack:
    return make_stack(tmp_path, gate=gate_of(key("user", allowance=Allowance(tokens_per_minute=1000))))


async def cost_of(live: LiveStack, **changes: Any) -> tuple[str, int]:
    """The answer, and what the ledger says."""
    async with live.http() as client:
        told = await client.post("/v1/completions", json=BODY | changes, headers=bearer("user"))
    return told.text, live.stack.gate.limiter.ledger.used("user").total


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["x" * 50, ["x" * 50, "y" * 60]])
async def test_a_request_that_fails_before_its_first_token(live: LiveStack, stream: bool, prompt: Any) -> None:
    live.stack.engine.status = "restarting"
    text, cost = await cost_of(live, stream=stream, prompt=prompt)
    assert "the engine is restarting" in text
    assert cost == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_one_prompt_of_several_that_is_refused(live: LiveStack, stream: bool) -> None:
    text, cost = await cost_of(live, stream=stream, prompt=["x" * 50, "y" * 400])
    assert "prompt and completion together may have 256" in text
    assert cost == 0


async def test_an_answer_that_has_begun(live: LiveStack) -> None:
    posted = {"json": BODY | {"stream": True, "max_tokens": 200}, "headers": bearer("user")}
    live.stack.engine.hold_after(4)
    async with live.http() as client, client.stream("POST", "/v1/completions", **posted) as answer:
        pieces = answer.aiter_lines()
        await anext(pieces)
        live.stack.engine.die()
        assert "engine stopped" in "".join([piece async for piece in pieces])
    assert live.stack.gate.limiter.ledger.used("user").total > 50

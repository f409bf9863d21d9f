"""All prompts of a call are served by the same versions, whatever changes while they are tokenized."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from perseid_server.access.caller import Caller
from perseid_server.frontend.requests import TextInput
from perseid_server.frontend.speculation import Drafting
from tests.fakes import expected
from tests.server.stack import LiveStack, Stack, make_stack, until

PROMPTS = ["say", "tell"]


class Heads:
    """Heads for everything; one version after the other."""

    version = "first"

    def heads_for(self, _: object) -> "Heads":
        found = Heads()
        found.version = self.version
        return found


@pytest.fixture
def heads() -> Heads:
    return Heads()


@pytest.fixture
def stack(tmp_path, heads: Heads) -> Stack:
    return make_stack(tmp_path, drafting=Drafting(heads, "medusa"))


class Held:
    """A tokenizer that waits before one of the prompts, as it does for the thread that long ones are tokenized in."""

    def __init__(self, encode: Callable[..., Awaitable[tuple[int, ...]]]) -> None:
        self._encode = encode
        self.prompt = PROMPTS[0]
        self.waits = False
        self.go_on = asyncio.Event()

    async def encode(self, source: TextInput, caller: Caller) -> tuple[int, ...]:
        if source.text == self.prompt:
            self.waits = True
            await self.go_on.wait()
        return await self._encode(source, caller)


@pytest.fixture
def held(live: LiveStack, monkeypatch: pytest.MonkeyPatch) -> Held:
    text = live.stack.service.text
    held = Held(text.encode)
    monkeypatch.setattr(text, "encode", held.encode)
    return held


async def answer(live: LiveStack, held: Held, change: Callable[[], Awaitable[object]], **body: Any) -> dict[str, Any]:
    """Of both prompts, with a change between them."""
    async with live.http() as client:
        posted = {"prompt": PROMPTS, "max_tokens": 4, "temperature": 0, **body}
        asking = asyncio.create_task(client.post("/v1/completions", json=posted))
        await until(lambda: held.waits or asking.done())
        await change()
        held.go_on.set()
        answered = await asking
    assert answered.status_code == 200, answered.text
    return answered.json()


def served(live: LiveStack) -> set[object]:
    """What the engine was asked for, each once."""
    assert len(live.stack.engine.submitted) == 2
    return {submit.adaptation for submit in live.stack.engine.submitted}


@pytest.mark.parametrize("is_replaced", [True, False])
async def test_one_adapter(live: LiveStack, held: Held, is_replaced: bool) -> None:
    stack = live.stack
    version = await stack.load("one", seed=1)

    async def change() -> None:
        await (stack.load("one", seed=2, replace=True) if is_replaced else stack.registry.unload("one"))

    told = await answer(live, held, change, model="one")
    assert told["perseid"]["adapter"]["version"] == version
    assert [choice["text"] for choice in told["choices"]] == [
        bytes(expected(tuple(prompt.encode()), version, 4)).decode() for prompt in PROMPTS
    ]
    await until(lambda: not stack.registry.leases.versions())


async def test_a_blend(live: LiveStack, held: Held) -> None:
    stack = live.stack
    for seed, name in enumerate(("one", "two")):
        await stack.load(name, seed=seed)
    blend = [{"name": "one", "weight": 0.5}, {"name": "two", "weight": 0.5}]
    await answer(live, held, lambda: stack.load("two", seed=2, replace=True), model="tiny", adapters=blend)
    assert len(served(live)) == 1


async def test_a_gate_set(live: LiveStack, held: Held) -> None:
    stack = live.stack
    for seed, name in enumerate(("one", "two")):
        await stack.load(name, seed=seed)
    version = await stack.load_gates("gates", "one", "two", seed=1)

    async def change() -> None:
        await stack.load_gates("gates", "two", "one", seed=2, replace=True)
        await stack.registry.unload("one")

    told = await answer(live, held, change, model="auto")
    assert {one["auto"]["version"] for one in told["perseid"]["prompts"]} == {version}
    assert len(served(live)) == 1


async def test_heads(live: LiveStack, held: Held, heads: Heads) -> None:
    async def change() -> None:
        heads.version = "second"

    held.prompt = PROMPTS[1]
    await answer(live, held, change, model="tiny")
    assert {submit.speculation.heads for submit in live.stack.engine.submitted} == {"second"}


async def test_a_call_is_in_the_queue_as_a_whole_before_its_prompts_are_tokenized(live: LiveStack, held: Held) -> None:
    async def change() -> None:
        assert live.stack.service._admission.in_progress == 2
        live.stack.service.draining.begin()  # which ends no call that has begun

    await answer(live, held, change, model="tiny")

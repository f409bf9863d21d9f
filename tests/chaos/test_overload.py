"""Ten times what the queue holds: each request is answered once, most are refused at once, and all is free after."""

import asyncio
from collections import Counter
from pathlib import Path

from tests.fakes import expected
from tests.server.stack import make_stack, serving

QUEUE, FACTOR = 20, 10


async def test_ten_times_too_many_requests(tmp_path: Path) -> None:
    stack = make_stack(tmp_path, max_queue=QUEUE)
    version = await stack.load("one")
    async with serving(stack) as live, live.http() as client:
        stack.engine.hold()  # the queue fills before anything ends
        prompts = [f"say {i}" for i in range(QUEUE * FACTOR)]
        bodies = [{"model": "one", "prompt": prompt, "max_tokens": 8} for prompt in prompts]
        asked = [asyncio.create_task(client.post("/v1/completions", json=body)) for body in bodies]
        refused, admitted = await _refused(asked, QUEUE * (FACTOR - 1))
        stack.engine.go_on()
        answered = await asyncio.gather(*admitted)

        assert Counter(answer.status_code for answer in refused) == {429: QUEUE * (FACTOR - 1)}
        assert all(1 <= int(answer.headers["Retry-After"]) <= 60 for answer in refused)
        assert Counter(answer.status_code for answer in answered) == {200: QUEUE}
        for task, prompt in zip(asked, prompts, strict=True):
            if task in admitted:
                alone = bytes(expected(tuple(prompt.encode()), version, 8)).decode()
                assert task.result().json()["choices"][0]["text"] == alone

        assert (await client.post("/v1/completions", json=bodies[0])).status_code == 200
    assert len(stack.engine.submitted) == QUEUE + 1
    assert not stack.registry.leases.versions()
    assert (stack.service._admission.in_progress, stack.service._admission.tokens_in_progress) == (0, 0)
    assert stack.engine.engine.stats().kv_blocks_used == 0
    assert not stack.engine.engine.has_work


async def _refused(asked: list[asyncio.Task], count: int) -> tuple[list, set]:
    """Answers of those refused while all others still run, and those others."""
    waiting, refused = set(asked), []
    async with asyncio.timeout(60):
        while len(refused) < count:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            refused += [task.result() for task in done]
    return refused, waiting

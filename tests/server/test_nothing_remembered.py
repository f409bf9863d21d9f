"""Adapters come and go for months: what is gone leaves nothing behind in either process, whatever became of it."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
import torch

from perseid_kernels.routing import GateTable
from perseid_server.adapters.gate_residency import GateResidency, GateSource
from perseid_server.adapters.pool import AdapterPool
from perseid_server.adapters.residency import Residency
from perseid_server.adapters.residents import Residents
from perseid_server.engine.config import EngineConfig
from perseid_server.frontend.metrics import speculation
from perseid_server.ipc.engine_client import EngineProcess
from tests.fakes import fake_engine, tiny_spec
from tests.remembered import texts_held_by
from tests.server.stack import Stack, background, make_stack, stored, write_adapter

KEPT = "kept"
NUM_GONE = 12
MOST_SEEN = 4
"""Versions whose last counts the metrics of drafting keep beside those that have names; 2000 outside of this test."""

MARK = re.compile(r"gone-\d+|[0-9a-f]{64}")


def gate_table(source: GateSource) -> GateTable:
    return GateTable((), torch.zeros(2, dtype=torch.int32), len(source.adapters) + source.null)


@pytest_asyncio.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    """A server over the real residency."""
    pool = AdapterPool(tiny_spec(), 4, torch.device("cpu"), torch.float32)
    residency = Residents(Residency(tiny_spec(), pool, 1 << 20), GateResidency(gate_table))
    yield make_stack(tmp_path, engine=fake_engine(num_blocks=512, max_model_len=256, residency=residency))
    residency.close()


async def ask(http: httpx.AsyncClient, model: str) -> None:
    body = {"model": model, "prompt": "abcabcabc", "max_tokens": 12, "ignore_eos": True}
    answer = await http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text


async def load(http: httpx.AsyncClient, name: str, folder: Path) -> int:
    body = {"lora_name": name, "lora_path": str(folder), "load_inplace": True}
    return (await http.post("/v1/load_lora_adapter", json=body)).status_code


async def unload(http: httpx.AsyncClient, name: str) -> None:
    assert (await http.post("/v1/unload_lora_adapter", json={"lora_name": name})).status_code == 200


async def come_and_go(http: httpx.AsyncClient, stack: Stack, number: int) -> None:
    """Loaded, used, replaced, used by name and by gates, unloaded while it is in use; then refused."""
    name, gates = f"gone-{number}", f"gone-{number}0000"
    for seed in (2 * number, 2 * number + 1):
        assert await load(http, name, write_adapter(stack.root / name, seed=seed)) == 200
        await ask(http, name)
    await stack.load_gates(gates, KEPT, name, seed=number)
    await ask(http, f"auto:{gates}")
    stack.engine.hold()
    stack.engine.submitted.clear()
    running = [asyncio.create_task(ask(http, model)) for model in (name, f"auto:{gates}")]
    await stack.engine.submissions(2)
    await unload(http, name)
    await unload(http, gates)
    stack.engine.go_on()
    await asyncio.gather(*running)
    (stack.root / name / "adapter_config.json").write_text("{}")
    assert await load(http, name, stack.root / name) == 400


async def test_adapters_that_are_gone_are_remembered_nowhere(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation, "_MAX_SEEN", MOST_SEEN)
    stack.says("abc" * 4)  # what is drafted comes true
    kept = await stack.load(KEPT, seed=10_000)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(stack.app), base_url="http://test") as http:
        for number in range(NUM_GONE):
            await come_and_go(http, stack, number)
            await ask(http, KEPT)
        await background(stack)
        assert (await http.get("/metrics")).status_code == 200
    assert stored(stack) == {kept}
    assert len(stack.metrics.speculation._seen) <= MOST_SEEN + len((KEPT, "base", "auto"))
    stack.metrics.speculation.ready()  # as with a new engine
    let_labels_go(stack)
    clear_notes(stack)
    held = {mark for text in texts_held_by(stack) for mark in MARK.findall(text)}
    assert kept in held, "what is there is found"
    assert held == {kept, tiny_spec().hash}


def let_labels_go(stack: Stack) -> None:
    """Labels stand still for a last scrape before they go."""
    labels, now = stack.metrics.labels, stack.metrics.labels._clock()
    for later in (1e6, 2e6):
        labels._clock = lambda now=now + later: now
        labels.review()


def clear_notes(stack: Stack) -> None:
    """What only the fakes remember."""
    stack.engine.submitted.clear()
    runner = stack.runner
    runner.steps.clear()
    runner.rows_of_steps.clear()
    runner._slots.clear()


def test_the_engines_supervisor_remembers_what_is_registered_and_no_more() -> None:
    process = EngineProcess(EngineConfig(model="none"))
    for number in range(50):
        version = f"{number:064x}"
        process.register_adapter(version, f"/store/{version}", pinned=number % 2 == 0)
        process.register_gate_set(version[::-1], None, (version,), null=True)
        process.register_heads(f"{number:032x}" * 2, "/store/heads")
        process.pin_adapter(version, pinned=number % 2 == 1)
        if number != 7:
            process.forget_adapter(version)
            process.forget_gate_set(version[::-1])
            process.forget_heads(f"{number:032x}" * 2)
    held = {mark for text in texts_held_by(process) for mark in MARK.findall(text)}
    assert held == {f"{7:064x}", f"{7:064x}"[::-1], f"{7:032x}" * 2}

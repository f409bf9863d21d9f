"""Proof 2: an answer does not depend on neighbours, chunking, the prefix cache or preemption.

The engine runs in this process on the embedded base. The native backend fixes the order of every sum, so answers
are compared bit by bit, log-probabilities included.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from perseid_server.adapters.store import version_of
from perseid_server.engine.adaptation import Adaptation
from perseid_server.engine.build import build_engine
from perseid_server.engine.config import EngineConfig
from perseid_server.engine.engine import Engine
from perseid_server.engine.messages import SequenceOutput, Submit
from perseid_server.model.sampling_params import SamplingParams

NUM_TOKENS = 24
NAMES = ("r16-all", None, "r17-mlp", "r64-down", "r8-patterns", "r1-all")


@dataclass(frozen=True)
class Answer:
    """What a request got: tokens, their log-probabilities to the last bit, and what came from the cache."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    cached_tokens: int = 0

    def numbers(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """What must not depend on anything."""
        return self.token_ids, self.logprobs


def answer(outputs: list[SequenceOutput]) -> Answer:
    assert outputs[-1].finish_reason == "length", outputs[-1].error
    return Answer(
        tuple(token for output in outputs for token in output.token_ids),
        tuple(logprob.logprob for output in outputs for logprob in output.logprobs),
        sum(output.cached_tokens for output in outputs),
    )


def run(engine: Engine, requests: list[Submit]) -> list[Answer]:
    """All requests together, in one engine."""
    outputs: dict[str, list[SequenceOutput]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        step = engine.step()
        for output in step.outputs:
            outputs[output.request_id].append(output)
        if step.iteration_tokens == 0:
            time.sleep(0.001)  # an adapter is on its way: leave the interpreter to the loader
    return [answer(outputs[request.request_id]) for request in requests]


@pytest.fixture(scope="module")
def versions(adapter_folders: dict[str, Path]) -> dict[str, tuple[str, str]]:
    """name → (version, folder), as the store would give them."""
    return {name: (version_of(folder), str(folder)) for name, folder in adapter_folders.items()}


@pytest.fixture(scope="module")
def new_engine(versions: dict[str, tuple[str, str]]) -> Callable[..., Engine]:
    """Builds engines on the embedded base that know the adapters."""

    def build(**options: object) -> Engine:
        engine = build_engine(EngineConfig(**options)).engine
        for version, path in versions.values():
            engine.register_adapter(version, path)
        return engine

    return build


@pytest.fixture(scope="module")
def requests(prompts: list[tuple[int, ...]], versions: dict[str, tuple[str, str]]) -> list[Submit]:
    """Twelve greedy and sampled requests of uneven lengths over five adapters and the base."""

    def request(index: int) -> Submit:
        name = NAMES[index % len(NAMES)]
        sampling = SamplingParams(
            max_tokens=NUM_TOKENS, temperature=0.9 * (index % 2), seed=index, ignore_eos=True, logprobs=0
        )
        adapter = versions[name][0] if name else None
        return Submit(f"request-{index}", prompts[index + 1], sampling, Adaptation.of(adapter))

    return [request(index) for index in range(12)]


@pytest.fixture(scope="module")
def alone(new_engine: Callable[..., Engine], requests: list[Submit]) -> list[Answer]:
    """Each request alone, its prefill whole, nothing cached."""
    engine = new_engine(prefix_cache=False)
    return [run(engine, [request])[0] for request in requests]


def same(got: list[Answer], wanted: list[Answer]) -> bool:
    return [answer.numbers() for answer in got] == [answer.numbers() for answer in wanted]


def test_alone_and_in_a_mixed_batch(
    new_engine: Callable[..., Engine], requests: list[Submit], alone: list[Answer]
) -> None:
    assert same(run(new_engine(prefix_cache=False), requests), alone)


def test_whole_and_chunked_prefill(
    new_engine: Callable[..., Engine], requests: list[Submit], alone: list[Answer]
) -> None:
    assert max(len(request.prompt_token_ids) for request in requests) > 5 * 12
    assert same(run(new_engine(prefix_cache=False, max_batch_tokens=12, max_num_seqs=12), requests), alone)


def test_fresh_and_cached_prefix(
    new_engine: Callable[..., Engine], requests: list[Submit], alone: list[Answer]
) -> None:
    engine = new_engine()
    assert same(run(engine, requests), alone)
    again = run(engine, requests)
    assert same(again, alone)
    assert sum(answer.cached_tokens for answer in again) > 64, "nothing came from the cache: the test proves nothing"


def test_a_prefix_is_not_shared_between_adapters(
    new_engine: Callable[..., Engine], requests: list[Submit], alone: list[Answer]
) -> None:
    """The same prompt under every adapter in turn: another adapter's blocks would give another answer."""
    engine = new_engine()
    longest = max(range(len(requests)), key=lambda index: len(requests[index].prompt_token_ids))
    for request in requests[: len(NAMES)]:
        prompt = requests[longest].prompt_token_ids
        run(engine, [Submit("other", prompt, request.sampling, request.adaptation)])
    assert same(run(engine, [requests[longest]]), [alone[longest]])


def test_preempted_and_not(new_engine: Callable[..., Engine], requests: list[Submit], alone: list[Answer]) -> None:
    engine = new_engine(kv_memory=14, prefix_cache=False)
    assert same(run(engine, requests), alone)  # loads the adapters, so that the next time all begin together
    assert same(run(engine, requests), alone)
    assert engine.stats().num_preemptions > 0, "nothing was preempted: the test proves nothing"


def test_room_for_one_adapter_at_a_time(
    new_engine: Callable[..., Engine], requests: list[Submit], alone: list[Answer]
) -> None:
    """Four pages: r64-down takes all of them, so adapters must be evicted and loaded anew all the time."""
    engine = new_engine(adapter_memory=80)
    assert engine.stats().adapter_pages_total == 4
    assert same(run(engine, requests), alone)

"""Drafts by real heads over a real, tiny model: an answer is what it is without them, bit by bit, whatever was asked.

The heads are random, so they are mostly wrong; the vocabulary is small and trees are wide, so they are often right too.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from perseid_server.adapters.store import version_of
from perseid_server.engine import build
from perseid_server.engine.adaptation import BASE_COLUMN, Adaptation, Routing
from perseid_server.engine.config import EngineConfig
from perseid_server.engine.engine import Engine
from perseid_server.engine.messages import SequenceOutput, Submit
from perseid_server.model.sampling_params import SamplingParams
from perseid_server.speculation.options import OFF, Speculation
from tests.server.model.passes import backend_named
from tests.server.model.tiny import opened, write_tiny
from tests.server.speculation.heads_folders import medusa_v2, write_heads
from tests.server.stack import write_adapter, write_gate_set

VOCAB = 24
BOTH = Speculation("auto", "heads")
PROMPTS = tuple(tuple((7 * place * (row + 3) + row) % VOCAB for place in range(4 + 5 * row)) for row in range(5))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": VOCAB, "eos_token_id": VOCAB - 1}
    return write_tiny(tmp_path_factory.mktemp("speculation") / "base", "llama", torch.float32, **small)


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path]:
    """Version → folder; the second changes the heads too."""
    spec, root = opened(base).spec, base.parent
    plain = write_adapter(root / "plain", seed=1, rank=3, base=spec)
    both = _with_heads(write_adapter(root / "heads too", seed=2, rank=5, base=spec), spec.hidden_size)
    return {version_of(folder): folder for folder in (plain, both)}


def _with_heads(folder: Path, size: int) -> Path:
    file, config = folder / "adapter_model.safetensors", json.loads((folder / "adapter_config.json").read_text())
    draw = np.random.default_rng(9)
    name = "base_model.model.medusa_head.{}.0.linear.lora_{}.weight"
    pairs = {name.format(head, "A"): draw.standard_normal((5, size)).astype("f4") for head in range(3)}
    pairs |= {name.format(head, "B"): draw.standard_normal((size, 5)).astype("f4") for head in range(3)}
    save_file(load_file(file) | pairs, file)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj", "linear"]}))
    return folder


@pytest.fixture(scope="module")
def built(base: Path, adapters: dict[str, Path]) -> Callable[..., Engine]:
    """Builds engines that know two adapters, gates over them, and heads."""
    spec = opened(base).spec
    gates = write_gate_set(
        base.parent / "gates", {"a": next(iter(adapters)), "b": [*adapters][1]}, base=spec, null=True
    )
    heads = write_heads(base.parent / "heads", medusa_v2(base=spec))

    def make(backend: str = "native", **options: object) -> Engine:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "backend_for", lambda device, activations: backend_named(backend))
            sizes: dict[str, object] = {"device": "cpu", "kv_memory": 4, "adapter_memory": 4}
            engine = build.build_engine(EngineConfig(str(base), **(sizes | options))).engine  # type: ignore[arg-type]
        for version, folder in adapters.items():
            engine.register_adapter(version, str(folder), pinned=True)
        engine.register_gate_set("gates", str(gates), tuple(adapters), null=True)
        engine.register_heads("heads", str(heads))
        while engine.is_loading:
            engine.step()
            time.sleep(0.001)
        return engine

    return make


@pytest.fixture(scope="module")
def engine(built: Callable[..., Engine]) -> Engine:
    return built(draft_tokens=20, max_batch_tokens=4096)


def run(engine: Engine, requests: Sequence[Submit]) -> list[list[SequenceOutput]]:
    outputs: dict[str, list[SequenceOutput]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        step = engine.step()
        for output in step.outputs:
            assert output.error is None
            outputs[output.request_id].append(output)
        if step.iteration_tokens == 0:
            time.sleep(0.001)
    return list(outputs.values())


def answer(outputs: list[SequenceOutput]) -> tuple[object, ...]:
    """All that a request is told but for what drafts and caches spared it."""
    return (
        tuple(token for output in outputs for token in output.token_ids),
        tuple(logprob for output in outputs for logprob in output.logprobs),
        tuple(share for output in outputs if output.routing for share in output.routing.tokens),
        outputs[-1].finish_reason,
        outputs[-1].stop_token_id,
    )


def accepted(outputs: list[SequenceOutput]) -> int:
    return sum(output.accepted_tokens for output in outputs)


def adaptations(adapters: dict[str, Path]) -> list[Adaptation]:
    first, second = adapters
    return [
        Adaptation(),
        Adaptation.of(first),
        Adaptation.of(second),
        Adaptation(((first, 0.5), (second, 0.7))),
        Adaptation(routing=Routing("gates", (first, second, BASE_COLUMN), 2, 1.0)),
    ]


SAMPLING = {
    "greedy": SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True),
    "greedy that ends": SamplingParams(max_tokens=24, temperature=0.0, stop_token_ids=(3, 5)),
    "logprobs": SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=2),
    "penalties": SamplingParams(
        max_tokens=24, temperature=0.0, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3,
        logit_bias=((4, 2.0),),
    ),
    "seed": SamplingParams(max_tokens=24, temperature=0.6, seed=7, logprobs=0),
    "cut": SamplingParams(max_tokens=24, temperature=0.9, seed=8, top_k=5, top_p=0.8, min_p=0.05),
    "min tokens": SamplingParams(max_tokens=24, temperature=1.2, seed=9, min_tokens=9),
    "prompt logprobs": SamplingParams(max_tokens=6, temperature=0.0, prompt_logprobs=1),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLING)
def test_answers_are_bit_by_bit_those_without_drafts(engine: Engine, adapters: dict[str, Path], name: str) -> None:
    jobs = [
        Submit(f"{place}-{row}", prompt, SAMPLING[name], adaptation, report_routing=True, speculation=BOTH)
        for place, adaptation in enumerate(adaptations(adapters))
        for row, prompt in enumerate(PROMPTS)
    ]
    drafted = run(engine, jobs)
    plain = run(engine, [replace(job, speculation=OFF) for job in jobs])
    assert [answer(outputs) for outputs in drafted] == [answer(outputs) for outputs in plain]
    assert sum(map(accepted, drafted)) > 4
    assert sum(map(accepted, plain)) == 0
    assert engine.stats().kv_blocks_used == 0
    alone = [run(engine, [job])[0] for job in jobs[::7]]
    assert [answer(outputs) for outputs in alone] == [answer(outputs) for outputs in plain[::7]]


@pytest.mark.parametrize("options", [{"draft_tokens": 1}, {"draft_tokens": 63}, {}, {"kv_memory": 1, "block_size": 8}])
def test_whatever_the_budget(built: Callable[..., Engine], adapters: dict[str, Path], options: dict[str, int]) -> None:
    engine = built(**options)
    kinds = [BOTH, Speculation("ngram"), Speculation("medusa", "heads"), OFF]
    jobs = [
        Submit(f"{place}-{row}", prompt, SAMPLING["seed"], adaptation, speculation=kinds[(place + row) % 4])
        for place, adaptation in enumerate(adaptations(adapters))
        for row, prompt in enumerate(PROMPTS)
    ]
    drafted = run(engine, jobs)
    plain = run(engine, [replace(job, speculation=OFF) for job in jobs])
    assert [answer(outputs) for outputs in drafted] == [answer(outputs) for outputs in plain]


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_on_the_other_backends(built: Callable[..., Engine], adapters: dict[str, Path], backend: str) -> None:
    engine = built(backend, draft_tokens=12, max_num_seqs=4, max_batch_tokens=64, cuda_graphs=False)
    jobs = [
        Submit(str(place), PROMPTS[place % 2], replace(SAMPLING["greedy"], max_tokens=4), adaptation, speculation=BOTH)
        for place, adaptation in enumerate(adaptations(adapters)[-4:])
    ]
    drafted = run(engine, jobs)
    plain = run(engine, [replace(job, speculation=OFF) for job in jobs])
    assert [answer(outputs)[0] for outputs in drafted] == [answer(outputs)[0] for outputs in plain]
    assert sum(map(accepted, drafted)) > 0


def test_adapters_change_the_heads(engine: Engine, adapters: dict[str, Path]) -> None:
    """The pages of the second adapter hold what it adds to the heads: its drafts are others, its answers are not."""
    heads, (first, second) = engine._drafter.heads, adapters
    found = {}
    for version in (None, first, second):
        job = Submit("a", PROMPTS[1], SAMPLING["greedy"], Adaptation.of(version), speculation=BOTH)
        engine.submit(job)
        engine.step()
        sequence = engine._scheduler.running[0]
        whole = heads.propose([sequence])[0]
        pages, heads._pool._changes_heads = heads._pool._changes_heads, set()
        without = heads.propose([sequence])[0]
        heads._pool._changes_heads = pages
        found[version] = whole == without
        engine.abort("a")
    assert found == {None: True, first: True, second: False}


SEEDS = 4000


def test_sampled_tokens_have_the_distribution_of_the_model(engine: Engine) -> None:
    """Pearson's chi-square of the second to fourth token, given drafts, against those without drafts' own
    distribution: the exact one, from the model's log-probabilities of all first tokens for the second, and a sample of
    as many other seeds for those that follow."""
    prompt, vocabulary = PROMPTS[2], VOCAB
    sampling = SamplingParams(max_tokens=4, temperature=1.0, ignore_eos=True)
    exact = _second_token(engine, prompt)
    with_drafts = [Submit(str(seed), prompt, replace(sampling, seed=seed), speculation=BOTH) for seed in range(SEEDS)]
    outputs = run(engine, with_drafts)
    tokens = [answer(each)[0] for each in outputs]
    assert sum(map(accepted, outputs)) > SEEDS / 4, "drafts are accepted"
    counts = Counter(each[1] for each in tokens)  # type: ignore[index]
    statistic = sum((counts[token] - SEEDS * p) ** 2 / (SEEDS * p) for token, p in enumerate(exact))
    assert statistic < _chi_square_999(vocabulary - 1)
    other = [Submit(str(seed), prompt, replace(sampling, seed=SEEDS + seed)) for seed in range(SEEDS)]
    others = [answer(each)[0] for each in run(engine, other)]
    for place in (2, 3):
        ours, theirs = (Counter(each[place] for each in found) for found in (tokens, others))  # type: ignore[index]
        seen = [token for token in range(vocabulary) if ours[token] + theirs[token]]
        statistic = sum((ours[token] - theirs[token]) ** 2 / (ours[token] + theirs[token]) for token in seen)
        assert statistic < _chi_square_999(len(seen) - 1)


def _second_token(engine: Engine, prompt: tuple[int, ...]) -> list[float]:
    """P(second token) = Σ P(first) · P(second | first)."""
    ask = SamplingParams(max_tokens=1, temperature=0.0, logprobs=VOCAB, ignore_eos=True)
    first = _probabilities(run(engine, [Submit("first", prompt, ask)])[0])
    after = run(engine, [Submit(str(token), (*prompt, token), ask) for token in range(VOCAB)])
    seconds = [_probabilities(outputs) for outputs in after]
    return [sum(p * of[token] for p, of in zip(first, seconds, strict=True)) for token in range(VOCAB)]


def _probabilities(outputs: list[SequenceOutput]) -> list[float]:
    top = dict(outputs[0].logprobs[0].top)
    return [math.exp(top[token]) for token in range(VOCAB)]


def _chi_square_999(degrees: int) -> float:
    """Its 99.9 % quantile (Wilson and Hilferty)."""
    return degrees * (1 - 2 / (9 * degrees) + 3.0902 * math.sqrt(2 / (9 * degrees))) ** 3


def test_typical_acceptance_takes_more(engine: Engine) -> None:
    sampling = SamplingParams(max_tokens=30, temperature=1.0, ignore_eos=True, logprobs=VOCAB)
    jobs = [Submit(str(seed), PROMPTS[1], replace(sampling, seed=seed), speculation=BOTH) for seed in range(40)]
    typical = [replace(job, speculation=replace(BOTH, acceptance="typical", epsilon=0.05, delta=0.3)) for job in jobs]
    exact_outputs, typical_outputs = run(engine, jobs), run(engine, typical)
    assert sum(map(accepted, typical_outputs)) > 1.3 * sum(map(accepted, exact_outputs))


def test_greedy_requests_are_lossless_also_with_typical_acceptance(engine: Engine) -> None:
    job = Submit("a", PROMPTS[3], SAMPLING["greedy"], speculation=replace(BOTH, acceptance="typical"))
    assert answer(run(engine, [job])[0]) == answer(run(engine, [replace(job, speculation=OFF)])[0])

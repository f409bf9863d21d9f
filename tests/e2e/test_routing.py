"""Proof: the identities of routing and blending on the real base, bit by bit, and its numbers against PEFT.

Gates are random and strong, so that tokens, layers and linears choose differently. The eight adapters have unequal
ranks and leave different modules alone.
"""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from perseid_server.adapters.store import version_of
from perseid_server.engine.adaptation import BASE_COLUMN, Adaptation, Routing
from perseid_server.engine.build import build_engine
from perseid_server.engine.config import EngineConfig
from perseid_server.engine.engine import Engine
from perseid_server.engine.messages import RoutingReport, SequenceOutput, Submit
from perseid_server.model.sampling_params import SamplingParams
from tests.e2e.random_gates import write_gates
from tests.e2e.reference import Reference, ReferenceAnswer, ReferenceGates

NUM_TOKENS = 20
UNGATED = ("layers.3.k_proj", "layers.4.q_proj", "layers.4.k_proj", "layers.4.v_proj", "layers.5.down_proj")
MARGIN_TOLERANCE = 2e-3  # as in test_fidelity; a near-tie of two gates is as rare and shows the same way

Numbers = tuple[tuple[int, ...], tuple[float, ...]]


@pytest.fixture(scope="module")
def versions(adapter_folders: dict[str, Path]) -> dict[str, str]:
    return {name: version_of(folder) for name, folder in adapter_folders.items()}


@pytest.fixture(scope="module")
def gates(versions: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gates(tmp_path_factory.mktemp("gates") / "all", versions, null=True)


@pytest.fixture(scope="module")
def new_engine(
    gates: Path, versions: dict[str, str], adapter_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Engine]:
    """Builds engines that know the adapters and four gate sets: all eight adapters and the base; the same with linears
    that have no gates; the same where the base always wins; one adapter alone."""
    root = tmp_path_factory.mktemp("gates")
    of_eight = {
        "all": gates,
        "partial": write_gates(root / "partial", versions, null=True, ungated=UNGATED),
        "base wins": write_gates(root / "base", versions, null=True, null_bias=1e6),
    }
    only = write_gates(root / "only", {"r16-all": versions["r16-all"]}, null=False)

    def build(**options: object) -> Engine:
        engine = build_engine(EngineConfig(**options)).engine
        for name, folder in adapter_folders.items():
            engine.register_adapter(versions[name], str(folder))
        for name, folder in of_eight.items():
            engine.register_gate_set(name, str(folder), tuple(versions.values()), null=True)
        engine.register_gate_set("only", str(only), (versions["r16-all"],), null=False)
        return engine

    return build


@pytest.fixture(scope="module")
def engine(new_engine: Callable[..., Engine]) -> Engine:
    return new_engine(prefix_cache=False)


def routed(
    versions: dict[str, str],
    *names: str,
    base: bool = True,
    k: int = 2,
    temperature: float = 1.0,
    gate_set: str = "all",
) -> Adaptation:
    """Routed among these adapters (all without a name) and the base."""
    chosen = names or tuple(versions)
    columns = [version if name in chosen else None for name, version in versions.items()]
    return Adaptation(routing=Routing(gate_set, (*columns, BASE_COLUMN if base else None), k, temperature))


def run(engine: Engine, requests: list[Submit]) -> list[list[SequenceOutput]]:
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


def numbers(outputs: list[SequenceOutput]) -> Numbers:
    tokens = tuple(token for output in outputs for token in output.token_ids)
    return tokens, tuple(logprob.logprob for output in outputs for logprob in output.logprobs)


def request(name: str, prompt: tuple[int, ...], adaptation: Adaptation, *, report: bool = False) -> Submit:
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, logprobs=0)
    return Submit(name, prompt, sampling, adaptation, report_routing=report)


def answer(engine: Engine, prompt: tuple[int, ...], adaptation: Adaptation) -> Numbers:
    return numbers(run(engine, [request("r", prompt, adaptation)])[0])


def test_a_forced_label_is_the_adapter_asked_for_by_name(engine, versions, prompts) -> None:
    for index, name in enumerate(versions):
        forced = answer(engine, prompts[index], routed(versions, name, base=False))
        assert forced == answer(engine, prompts[index], Adaptation.of(versions[name])), name
        assert forced != answer(engine, prompts[index], Adaptation()), name


def test_a_gate_set_of_one_adapter_is_that_adapter(engine, versions, prompts) -> None:
    only = Adaptation(routing=Routing("only", (versions["r16-all"],), 2, 1.0))
    assert answer(engine, prompts[2], only) == answer(engine, prompts[2], Adaptation.of(versions["r16-all"]))


def test_only_the_base_allowed_is_the_base(engine, versions, prompts) -> None:
    nothing = Adaptation(routing=Routing("all", (*[None] * len(versions), BASE_COLUMN), 2, 1.0))
    assert answer(engine, prompts[3], nothing) == answer(engine, prompts[3], Adaptation())


@pytest.mark.parametrize("k", [1, 2])
def test_where_gates_choose_the_base_the_base_answers(engine, versions, prompts, k: int) -> None:
    chosen = answer(engine, prompts[3], routed(versions, k=k, gate_set="base wins"))
    assert chosen == answer(engine, prompts[3], Adaptation())


def test_each_option_of_a_request_counts(engine, versions, prompts) -> None:
    adaptations = [
        Adaptation(),
        routed(versions),
        routed(versions, k=1),
        routed(versions, k=4),
        routed(versions, gate_set="partial"),
        routed(versions, temperature=20.0),
        routed(versions, base=False),
        routed(versions, "r16-all", "r17-mlp"),
        routed(versions, "r16-all", "r1-all"),
    ]
    answers = [answer(engine, prompts[5], adaptation) for adaptation in adaptations]
    assert len(set(answers)) == len(answers)


@pytest.fixture(scope="module")
def mixed(versions: dict[str, str], prompts: list[tuple[int, ...]]) -> list[Submit]:
    """Routed, blended, explicit and base requests of uneven lengths."""
    adaptations = [
        routed(versions),
        Adaptation.of(versions["r16-all"]),
        routed(versions, k=1),
        Adaptation(),
        routed(versions, "r64-down", "r8-patterns", "r1-all", temperature=3.0),
        Adaptation.of(versions["r17-mlp"]),
        Adaptation(tuple(sorted(((versions["r4-qv"], 0.5), (versions["r64-down"], -0.75), (versions["r1-all"], 1.5))))),
        routed(versions, base=False, k=3),
        Adaptation(routing=Routing("only", (versions["r16-all"],), 1, 1.0)),
        routed(versions),
    ]
    return [request(f"r{i}", prompts[i + 1], adaptation) for i, adaptation in enumerate(adaptations)]


@pytest.fixture(scope="module")
def alone(engine: Engine, mixed: list[Submit]) -> list[Numbers]:
    return [numbers(run(engine, [each])[0]) for each in mixed]


def test_alone_and_in_a_mixed_batch(engine, mixed, alone) -> None:
    assert [numbers(outputs) for outputs in run(engine, mixed)] == alone


def test_whole_and_chunked_prefill(new_engine, mixed, alone) -> None:
    chunked = new_engine(prefix_cache=False, max_batch_tokens=16, max_num_seqs=16)
    assert [numbers(outputs) for outputs in run(chunked, mixed)] == alone


def test_fresh_cached_and_preempted(new_engine, mixed, alone) -> None:
    caching = new_engine()
    assert [numbers(outputs) for outputs in run(caching, mixed)] == alone
    again = run(caching, mixed)
    assert [numbers(outputs) for outputs in again] == alone
    assert sum(output.cached_tokens for outputs in again for output in outputs) >= 48
    small = new_engine(kv_memory=12, prefix_cache=False)
    run(small, mixed)
    assert [numbers(outputs) for outputs in run(small, mixed)] == alone
    assert small.stats().num_preemptions > 0, "nothing was preempted: the test proves nothing"


def test_a_prefix_is_not_shared_between_adaptations(new_engine, mixed, alone) -> None:
    engine = new_engine()
    prompt = mixed[0].prompt_token_ids
    for each in mixed[1:-1]:
        run(engine, [request("other", prompt, each.adaptation)])
    assert numbers(run(engine, [mixed[0]])[0]) == alone[0]


def test_every_adapter_of_a_routed_request_is_brought_to_a_small_pool(new_engine, versions, mixed, alone) -> None:
    """All adapters together need 14 pages, which is all there is."""
    engine = new_engine(adapter_memory=275, prefix_cache=False)
    assert engine.stats().adapter_pages_total == 14
    assert [numbers(outputs) for outputs in run(engine, mixed)] == alone


def test_a_request_whose_adapters_never_fit_is_told_so(new_engine, versions, prompts) -> None:
    engine = new_engine(adapter_memory=80)
    engine.submit(request("r", prompts[1], routed(versions)))
    errors = []
    while engine.has_work:
        errors += [output.error for output in engine.step().outputs]
    assert len(errors) == 1
    assert "pages of adapter memory together and there are 4; raise --adapter-memory" in errors[0]


def close(got: Numbers, wanted: ReferenceAnswer) -> None:
    if got[0] == wanted.token_ids:
        return
    first = next(i for i, (a, b) in enumerate(zip(got[0], wanted.token_ids, strict=True)) if a != b)
    assert wanted.margins[first] < MARGIN_TOLERANCE, f"token {first} parts with a margin of {wanted.margins[first]:.4f}"


@pytest.mark.parametrize(
    "weights", [{"r17-mlp": 0.5, "r16-all": 0.5}, {"r64-down": 1.0, "r1-all": -0.75, "r17-mlp": 0.3}]
)
def test_a_blend_is_pefts_weighted_sum(engine, reference: Reference, versions, prompts, weights) -> None:
    blend = Adaptation(tuple(sorted((versions[name], weight) for name, weight in weights.items())))
    got = answer(engine, prompts[4], blend)
    close(got, reference.greedy_blend(prompts[4], weights, NUM_TOKENS))
    assert got[0] not in {answer(engine, prompts[4], Adaptation.of(versions[name]))[0] for name in weights}


@pytest.mark.parametrize(
    ("k", "temperature", "base", "gate_set"),
    [(2, 1.0, True, "all"), (1, 1.0, True, "partial"), (3, 4.0, False, "all"), (2, 1.0, True, "partial")],
)
def test_routing_is_the_equation_in_float64(
    engine, reference: Reference, gates: Path, versions, prompts, k: int, temperature: float, base: bool, gate_set: str
) -> None:
    tensors = {name: torch.from_numpy(values) for name, values in load_file(gates / "gates.safetensors").items()}
    if gate_set == "partial":
        tensors = {name: values for name, values in tensors.items() if name.rpartition(".")[0] not in UNGATED}
    columns = (*versions, None)
    wanted = ReferenceGates(columns, tensors, k, temperature, frozenset(columns if base else versions))
    got = answer(engine, prompts[6], routed(versions, base=base, k=k, temperature=temperature, gate_set=gate_set))
    close(got, reference.greedy_routed(prompts[6], wanted, NUM_TOKENS))


def test_the_report_tells_what_was_chosen(engine, versions, prompts) -> None:
    free, forced = run(
        engine,
        [
            request("free", prompts[5], routed(versions), report=True),
            request("forced", prompts[6], routed(versions, "r1-all", base=False), report=True),
        ],
    )
    reports = [output.routing for output in forced]
    label = tuple(float(name == "r1-all") for name in (*versions, None))
    assert reports[0] == RoutingReport(pytest.approx(label), (pytest.approx(label),))
    assert all(report.prompt is None and report.tokens == (pytest.approx(label),) for report in reports[1:])
    shares = [report.prompt for report in (output.routing for output in free) if report.prompt]
    assert len(shares) == 1
    assert sum(shares[0]) == pytest.approx(1.0, abs=1e-4)
    assert sum(share > 0.02 for share in shares[0]) == len(versions) + 1, "random gates spread over all columns"
    before = dict(engine.stats().routed_tokens)
    run(engine, [request("r", prompts[5], routed(versions))])
    counted = {version: share - before[version] for version, share in engine.stats().routed_tokens}
    assert sum(counted.values()) == pytest.approx(len(prompts[5]) + NUM_TOKENS - 1, rel=1e-4)
    assert engine.stats().gate_entropy > 0

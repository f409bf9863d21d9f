"""What a scrape shows after a few requests: names people's dashboards know, and values that are true."""

import subprocess
import time
from collections import Counter

import pytest
from prometheus_client.parser import text_string_to_metric_families

from perseid_loadtest.scrape_cost import filled
from perseid_server.engine.messages import AdapterState, EngineReady, EngineStats, StepOutputs
from perseid_server.errors import Unavailable
from perseid_server.frontend.adaptation_options import AutoOptions, BlendOf, Named
from perseid_server.frontend.metrics import MAX_ADAPTER_LABELS, Metrics
from perseid_server.frontend.requests import GenerationRequest, SamplingOptions, TextInput
from tests.fakes import fake_ready
from tests.server.stack import Stack, certain_router
from tests.tools import require_tool

GAUGES = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "model_weight_bytes", "engine_up"} | {
    "lora_requests_info", "lora_cache_info", "lora_cache_usage_ratio", "lora_cache_num_adapters",
    "gate_null_share", "spec_decode_saved_seconds", "spec_decode_budget_rows",
    "ready", "build_info", "engine_step_age_seconds", "process_resident_memory_bytes",
}  # fmt: skip
COUNTERS = {"prompt_tokens", "generation_tokens", "num_preemptions", "prefix_cache_queries", "prefix_cache_hits"} | {
    "request_success", "lora_cache_hits", "lora_cache_lookups", "adapter_requests", "adapter_generation_tokens",
    "adapter_loads", "engine_restarts", "request_failure", "routed_tokens", "auto_requests",
    "spec_decode_num_steps", "spec_decode_num_tokens", "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens", "requests_rejected", "deadline_exceeded",
}  # fmt: skip
HISTOGRAMS = {
    "time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds",
    "request_decode_time_seconds", "request_prompt_tokens", "request_generation_tokens", "iteration_tokens",
    "gate_entropy_nats", "adapter_load_seconds", "event_loop_lag_seconds",
}  # fmt: skip


def samples(metrics: Metrics) -> dict[str, float]:
    """Every sample of a scrape, as it is written."""
    lines = [line for line in metrics.render().decode().splitlines() if not line.startswith("#")]
    return {name.removeprefix("perseid_"): float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


async def run(stack: Stack, adapter: str | None = None, **sampling) -> None:
    options = SamplingOptions(**{"max_tokens": 4} | sampling)
    asked = GenerationRequest("r", TextInput("say"), Named(adapter) if adapter else None, options)
    async with stack.service.generate(asked) as generation:
        async for _ in generation:
            pass


async def a_few_requests(stack: Stack) -> dict[str, float]:
    stack.metrics.engine_ready(fake_ready())
    await stack.load("one")
    await run(stack)
    await run(stack, "one", n=2)
    stack.says("abc")
    await run(stack, max_tokens=9)
    return samples(stack.metrics)


def test_families_have_the_names_and_types_of_the_conventions(stack: Stack) -> None:
    families = {
        family.name.removeprefix("perseid_"): family.type
        for family in text_string_to_metric_families(stack.metrics.render().decode())
    }
    assert families == dict.fromkeys(GAUGES, "gauge") | dict.fromkeys(COUNTERS, "counter") | dict.fromkeys(
        HISTOGRAMS, "histogram"
    )


async def test_counters_and_histograms_tell_what_was_done(stack: Stack) -> None:
    told = await a_few_requests(stack)
    assert told['request_success_total{finished_reason="length"}'] == 3
    assert told['request_success_total{finished_reason="stop"}'] == 1
    assert told["generation_tokens_total"] == 4 + 2 * 4 + 3
    assert told["request_generation_tokens_sum"] == 4 + 2 * 4 + 3
    assert told["request_prompt_tokens_count"] == told["e2e_request_latency_seconds_count"] == 4
    assert told["time_to_first_token_seconds_count"] == told["request_queue_time_seconds_count"] == 4
    assert told['adapter_requests_total{adapter="base"}'] == told['adapter_requests_total{adapter="one"}'] == 2
    assert told['adapter_generation_tokens_total{adapter="one"}'] == 8
    assert told["iteration_tokens_count"] > 0
    assert told["kv_cache_usage_perc"] == 0.0
    assert told["model_weight_bytes"] == 1000.0
    assert told['lora_cache_info{num_pages="8",page_rank="16"}'] == 1.0


async def test_loads_are_counted_by_outcome(stack: Stack) -> None:
    await stack.load("one")
    with pytest.raises(Exception, match="root"):
        await stack.registry.load("two", "/etc")
    told = samples(stack.metrics)
    assert told['adapter_loads_total{outcome="loaded"}'] == told['adapter_loads_total{outcome="refused"}'] == 1


async def test_requests_without_an_answer_are_counted_by_kind(stack: Stack) -> None:
    async with stack.service.generate(GenerationRequest("r", TextInput("say"))) as generation:
        await anext(aiter(generation))
    async with stack.service.generate(GenerationRequest("r", TextInput("say"))) as generation:
        await anext(aiter(generation))
        stack.engine.die()
        with pytest.raises(Unavailable):
            async for _ in generation:
                pass
    told = samples(stack.metrics)
    assert told['request_failure_total{kind="aborted"}'] == 1
    assert told['request_failure_total{kind="unavailable"}'] == 1


async def test_tokens_of_answers_that_did_not_finish_count_for_their_adapter(stack: Stack) -> None:
    await stack.load("one")
    asked = GenerationRequest("r", TextInput("say"), Named("one"), SamplingOptions(max_tokens=4))
    async with stack.service.generate(asked) as generation:
        delta = await anext(aiter(generation))
    told = samples(stack.metrics)
    assert told['adapter_generation_tokens_total{adapter="one"}'] == len(delta.token_ids) > 0
    assert told["generation_tokens_total"] == len(delta.token_ids)


async def test_latencies_count_from_arrival(stack: Stack) -> None:
    """A prompt that waits to be tokenized waits too."""
    asked = GenerationRequest("r", TextInput("say"), arrived=time.monotonic() - 100)
    async with stack.service.generate(asked) as generation:
        async for _ in generation:
            pass
    told = samples(stack.metrics)
    assert told["time_to_first_token_seconds_sum"] > 100
    assert told["e2e_request_latency_seconds_sum"] > 100


def test_running_and_waiting_adapters_are_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics(8)
    monkeypatch.setattr("time.time", lambda: 1234.0)
    stats = EngineStats(running_adapters=("v2", "v1"), waiting_adapters=("v3" * 32,))
    metrics.engine_stepped(StepOutputs(stats=stats), {"v1": "one", "v2": "two"})
    labels = 'max_lora="8",running_lora_adapters="one,two",waiting_lora_adapters="v3v3v3v3v3v3"'
    info = {name: value for name, value in samples(metrics).items() if name.startswith("lora_requests_info")}
    assert info == {f"lora_requests_info{{{labels}}}": 1234.0}
    metrics.engine_stepped(StepOutputs(), {})
    assert [name for name in samples(metrics) if name.startswith("lora_requests_info")] == [
        'lora_requests_info{max_lora="8",running_lora_adapters="",waiting_lora_adapters=""}'
    ]


def test_engine_counters_go_on_across_a_restart() -> None:
    metrics = Metrics(8)
    ready: EngineReady = fake_ready()
    for _ in range(2):
        metrics.engine_ready(ready)
        metrics.engine_stepped(StepOutputs(stats=EngineStats(num_preemptions=2, prefix_cache_hits=5)), {})
        metrics.engine_stepped(StepOutputs(stats=EngineStats(num_preemptions=3, prefix_cache_hits=5)), {})
    told = samples(metrics)
    assert (told["num_preemptions_total"], told["prefix_cache_hits_total"]) == (6, 10)


def test_adapters_beyond_the_cap_share_one_label() -> None:
    metrics = Metrics(8)
    labels = [metrics.labels.of(f"adapter-{number}") for number in range(MAX_ADAPTER_LABELS + 10)]
    assert Counter(labels)["other"] == 10
    assert metrics.labels.of("adapter-3") == "adapter-3"


async def test_places_of_adapters_are_told_as_they_are_now(stack: Stack) -> None:
    def places() -> list[float]:
        told = samples(stack.metrics)
        return [told[f'lora_cache_num_adapters{{location="{place}"}}'] for place in ("disk", "host", "device")]

    version = await stack.load("one")
    await stack.load("two", seed=2)
    assert places() == [2, 0, 0]
    stack.engine.adapter_states[version] = AdapterState(version, "device")
    assert places() == [1, 0, 1]
    await stack.registry.unload("two")
    assert places() == [0, 0, 1]


def test_a_new_engine_runs_nothing() -> None:
    metrics = Metrics(8)
    stats = EngineStats(num_running=2, num_waiting=1, kv_blocks_used=4, kv_blocks_total=8, running_adapters=("v",))
    metrics.engine_stepped(StepOutputs(stats=stats), {"v": "one"})
    metrics.engine_ready(fake_ready())
    told = samples(metrics)
    assert (told["num_requests_running"], told["num_requests_waiting"], told["kv_cache_usage_perc"]) == (0, 0, 0)
    assert 'lora_requests_info{max_lora="8",running_lora_adapters="",waiting_lora_adapters=""}' in told
    assert sum(name.startswith("lora_requests_info") for name in told) == 1


async def test_what_gates_choose_is_counted_by_share(stack: Stack) -> None:
    stack.metrics.engine_ready(fake_ready())
    for seed, name in enumerate("ab"):
        await stack.load(name, seed=seed)
    await stack.load_gates("g", "a", "b", router=certain_router("a", "b"))
    for prompt in ("say", "aaaa"):
        asked = GenerationRequest("r", TextInput(prompt), AutoOptions(), SamplingOptions(max_tokens=4))
        async with stack.service.generate(asked) as generation:
            async for _ in generation:
                pass
    told = samples(stack.metrics)
    rows = 3 + 3  # of the prompt, and of all tokens but the last
    shares = [told[f'routed_tokens_total{{adapter="{name}"}}'] for name in ("a", "b", "base")]
    assert shares == pytest.approx([rows / 7, rows * 2 / 7, rows * 4 / 7])
    assert told["gate_null_share"] == pytest.approx(4 / 7)
    assert (told["gate_entropy_nats_count"], told["gate_entropy_nats_sum"]) == (4, pytest.approx(4 * 0.5))
    assert told['auto_requests_total{tier="token"}'] == told['auto_requests_total{tier="request"}'] == 1
    assert told['adapter_requests_total{adapter="auto"}'] == told['adapter_requests_total{adapter="a"}'] == 1
    assert told['adapter_generation_tokens_total{adapter="auto"}'] == 4
    assert complaints(stack.metrics.render()) == (0, b"", b"")


async def test_a_blend_counts_for_each_of_its_adapters(stack: Stack) -> None:
    for seed, name in enumerate("ab"):
        await stack.load(name, seed=seed)
    asked = GenerationRequest("r", TextInput("say"), BlendOf((("a", 0.5), ("b", 0.5))), SamplingOptions(max_tokens=4))
    async with stack.service.generate(asked) as generation:
        async for _ in generation:
            pass
    told = samples(stack.metrics)
    for name in "ab":
        assert told[f'adapter_requests_total{{adapter="{name}"}}'] == 1
        assert told[f'adapter_generation_tokens_total{{adapter="{name}"}}'] == 4
    assert 'adapter_requests_total{adapter="base"}' not in told


def test_routed_shares_go_on_across_a_restart() -> None:
    metrics = Metrics(8)
    for _ in range(2):
        metrics.engine_ready(fake_ready())
        for rows in (1, 3):
            shares = (("v", 0.25 * rows), ("", 0.75 * rows))
            metrics.engine_stepped(
                StepOutputs(stats=EngineStats(routed_tokens=shares, gate_entropy=rows)), {"v": "one"}
            )
    told = samples(metrics)
    assert (told['routed_tokens_total{adapter="one"}'], told['routed_tokens_total{adapter="base"}']) == (1.5, 4.5)
    assert (told["gate_entropy_nats_count"], told["gate_entropy_nats_sum"]) == (4, 4.0)


async def test_promtool_finds_nothing_to_complain_about(stack: Stack) -> None:
    await a_few_requests(stack)
    assert complaints(stack.metrics.render()) == (0, b"", b"")


def complaints(scrape: bytes) -> tuple[int, bytes, bytes]:
    """What promtool says of a scrape: exit status and both outputs."""
    promtool = require_tool("promtool", "Debian package prometheus")
    done = subprocess.run([promtool, "check", "metrics"], input=scrape, capture_output=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


def test_versions_that_lost_their_names_take_no_label() -> None:
    """An adapter that is replaced again and again must not use the labels of the others up."""
    metrics = Metrics(8)
    for number in range(2 * MAX_ADAPTER_LABELS):
        shares = tuple((f"v{version}", 1.0) for version in range(number + 1))
        metrics.engine_stepped(StepOutputs(stats=EngineStats(routed_tokens=shares)), {f"v{number}": "replaced"})
    metrics.engine_stepped(StepOutputs(stats=EngineStats(routed_tokens=(*shares, ("gone", 2.0)))), {})
    told = samples(metrics)
    assert told['routed_tokens_total{adapter="replaced"}'] == 2 * MAX_ADAPTER_LABELS
    assert told['routed_tokens_total{adapter="other"}'] == 2.0
    assert metrics.labels.of("new") == "new"


def test_refusals_deadlines_and_restarts_count_from_zero_by_reason() -> None:
    metrics = Metrics(8)
    for reason in ("queue_full", "tokens", "rate_limit", "quota", "draining"):
        assert samples(metrics)[f'requests_rejected_total{{reason="{reason}"}}'] == 0
    metrics.rejected("quota")
    metrics.deadline_exceeded("queue")
    metrics.engine_restarted("stuck")
    told = samples(metrics)
    assert told['requests_rejected_total{reason="quota"}'] == told['deadline_exceeded_total{stage="queue"}'] == 1
    assert told['engine_restarts_total{cause="stuck"}'] == 1
    assert told['engine_restarts_total{cause="exit"}'] == told['deadline_exceeded_total{stage="running"}'] == 0


def test_without_an_engine_nothing_runs() -> None:
    metrics = Metrics(8)
    metrics.engine_ready(fake_ready())
    assert samples(metrics)["engine_up"] == 1
    stats = EngineStats(num_running=2, num_waiting=1, kv_blocks_used=4, kv_blocks_total=8, running_adapters=("v",))
    metrics.engine_stepped(StepOutputs(stats=stats), {"v": "one"})
    metrics.engine_lost()
    told = samples(metrics)
    assert (told["engine_up"], told["num_requests_running"], told["num_requests_waiting"]) == (0, 0, 0)
    assert 'lora_requests_info{max_lora="8",running_lora_adapters="",waiting_lora_adapters=""}' in told


def test_the_age_of_the_step_and_readiness_are_asked_at_each_scrape() -> None:
    metrics, ages = Metrics(8), iter([0.0, 2.5])
    metrics.watch_step_age(lambda: next(ages))
    ready = iter([True, False])
    metrics.watch_ready(lambda: next(ready))
    assert [(told["engine_step_age_seconds"], told["ready"]) for told in (samples(metrics), samples(metrics))] == [
        (0.0, 1.0),
        (2.5, 0.0),
    ]


def test_adapters_are_counted_once_a_scrape() -> None:
    metrics, asked = Metrics(8), []

    def locations() -> Counter[str]:
        asked.append(1)
        return Counter(disk=3)

    metrics.watch_adapters(locations, frozenset)
    metrics.render()
    assert len(asked) == 1


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", 'x"} 1\nperseid_engine_up 7', "é\u2028", "{}"])
def test_hostile_names_stay_inside_their_label(name: str) -> None:
    metrics = Metrics(8)
    metrics.requests.by_adapter.labels(metrics.labels.of(name)).inc()
    metrics.engine_stepped(StepOutputs(stats=EngineStats(running_adapters=("v",))), {"v": name})
    families = {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}
    assert [sample.labels for sample in families["perseid_adapter_requests"].samples] == [{"adapter": name}]
    assert families["perseid_lora_requests_info"].samples[0].labels["running_lora_adapters"] == name
    assert [sample.value for sample in families["perseid_engine_up"].samples] == [0.0]


def test_a_scrape_of_a_thousand_adapters_is_clean_and_small() -> None:
    """What it takes is measured by `python -m perseid_loadtest.scrape_cost`; the time is proportional to the lines."""
    scrape = filled(1000).render()
    assert complaints(scrape) == (0, b"", b"")
    assert scrape.count(b"\n") < 900
    assert scrape.count(b"perseid_adapter_requests_total{") == MAX_ADAPTER_LABELS + 1

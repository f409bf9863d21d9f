"""The engine over the fake model: whatever is batched, chunked, cached or preempted, answers stay the same."""

import math
import random
from dataclasses import replace

import pytest

from perseid_server.engine.adaptation import BASE_COLUMN, Adaptation, Routing
from perseid_server.engine.engine import Engine
from perseid_server.engine.messages import SequenceOutput, Submit
from perseid_server.engine.ports import ChunkResult, RoutedChunk, ScheduledStep
from perseid_server.model.sampling_params import SamplingParams
from tests.fakes import EOS, FakeResidency, FakeRunner, expected, fake_engine, name_of, next_token


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    source = random.Random(seed * 1000 + length)
    return tuple(source.randrange(97, 123) for _ in range(length))


def request(name: str, prompt: tuple[int, ...], num_tokens: int = 6, adapter: str | None = None, **sampling) -> Submit:
    return Submit(
        name, prompt, SamplingParams(max_tokens=num_tokens, temperature=0.0, **sampling), Adaptation.of(adapter)
    )


def run(engine: Engine, limit: int = 2000) -> dict[str, list[SequenceOutput]]:
    outputs: dict[str, list[SequenceOutput]] = {}
    for _ in range(limit):
        if not engine.has_work:
            return outputs
        for output in engine.step().outputs:
            outputs.setdefault(output.request_id, []).append(output)
    raise AssertionError("the engine did not come to an end")


def tokens(outputs: list[SequenceOutput]) -> tuple[int, ...]:
    return tuple(token for output in outputs for token in output.token_ids)


def test_a_request_alone():
    engine = fake_engine()
    engine.submit(request("a", prompt_of(5)))
    outputs = run(engine)["a"]
    assert tokens(outputs) == expected(prompt_of(5), None, 6)
    assert [output.finish_reason for output in outputs] == [None] * 5 + ["length"]
    assert outputs[0].queue_s is not None
    assert engine.stats().kv_blocks_used == 0


def test_sixteen_mixed_requests_answer_as_each_alone():
    engine = fake_engine(num_blocks=200, max_num_seqs=16, max_batch_tokens=24)
    adapters = [None, "a", "b", "c"]
    jobs = [request(str(i), prompt_of(3 + 5 * (i % 7), i), 5 + i, adapters[i % 4]) for i in range(16)]
    for name in adapters[1:]:
        engine.register_adapter(name, "")
    for job in jobs:
        engine.submit(job)
    outputs = run(engine)
    for job in jobs:
        assert tokens(outputs[job.request_id]) == expected(
            job.prompt_token_ids, name_of(job.adaptation), job.sampling.max_tokens
        )


def test_a_long_prompt_is_computed_in_chunks_beside_decodes():
    runner = FakeRunner(64)
    engine = fake_engine(runner=runner, max_batch_tokens=8, max_num_seqs=4)
    engine.submit(request("short", prompt_of(3), 20))
    engine.step()
    engine.submit(request("long", prompt_of(30), 4))
    outputs = run(engine)
    assert tokens(outputs["long"]) == expected(prompt_of(30), None, 4)
    assert [("short", 1), ("long", 7)] in runner.rows_of_steps
    assert all(sum(count for _, count in rows) <= 8 for rows in runner.rows_of_steps)


def test_preempted_requests_answer_the_same():
    engine = fake_engine(num_blocks=12, max_num_seqs=4, caching=False)
    jobs = [request(str(i), prompt_of(8, i), 20) for i in range(4)]
    for job in jobs:
        engine.submit(job)
    outputs = run(engine)
    assert engine.stats().num_preemptions > 0
    for job in jobs:
        assert tokens(outputs[job.request_id]) == expected(job.prompt_token_ids, None, 20)
    assert engine.stats().kv_blocks_used == 0


def test_a_cached_prefix_answers_the_same_and_is_counted():
    engine = fake_engine()
    for name in ("first", "second"):
        engine.submit(request(name, prompt_of(21)))
        outputs = run(engine)[name]
        assert tokens(outputs) == expected(prompt_of(21), None, 6)
    assert outputs[0].cached_tokens == 20
    assert engine.stats().prefix_cache_hits == 20


def test_a_wholly_cached_prompt_still_computes_its_last_token():
    engine = fake_engine()
    for name in ("first", "second"):
        engine.submit(request(name, prompt_of(20)))
        outputs = run(engine)[name]
        assert tokens(outputs) == expected(prompt_of(20), None, 6)
    assert outputs[0].cached_tokens == 16


def test_a_prefix_is_not_shared_between_adapters_or_with_the_base():
    engine = fake_engine()
    engine.register_adapter("a", "")
    engine.register_adapter("b", "")
    for adapter in (None, "a", "b"):
        engine.submit(request(str(adapter), prompt_of(20), adapter=adapter))
        outputs = run(engine)[str(adapter)]
        assert outputs[0].cached_tokens == 0
        assert tokens(outputs) == expected(prompt_of(20), adapter, 6)


def test_abort_frees_everything_at_once():
    engine = fake_engine()
    engine.register_adapter("a", "")
    engine.submit(request("gone", prompt_of(20), 100, adapter="a"))
    engine.submit(request("waiting", prompt_of(20), 100, adapter="a"))
    for _ in range(4):
        engine.step()
    assert engine.stats().kv_blocks_used > 0
    engine.abort("gone")
    engine.abort("waiting")
    engine.abort("unknown")
    assert engine.stats().kv_blocks_used == 0
    assert not engine.has_work


def test_end_and_stop_tokens_finish_without_being_part_of_the_answer():
    def choose(adapter, context):
        return EOS if len(context) == 8 else next_token(adapter, context)

    engine = fake_engine(runner=FakeRunner(64, choose=choose))
    engine.submit(request("end", prompt_of(5), 50))
    outputs = run(engine)["end"]
    assert len(tokens(outputs)) == 3
    assert (outputs[-1].finish_reason, outputs[-1].stop_token_id) == ("stop", EOS)

    engine.submit(request("ignored", prompt_of(5, 1), 10, ignore_eos=True))
    assert len(tokens(run(engine)["ignored"])) == 10

    stop = expected(prompt_of(5, 2), None, 3)[2]
    engine.submit(request("stop", prompt_of(5, 2), 50, stop_token_ids=(stop,)))
    outputs = run(engine)["stop"]
    assert outputs[-1].finish_reason == "stop"
    assert stop not in tokens(outputs)


def test_max_tokens_zero_with_prompt_logprobs_scores_the_prompt():
    engine = fake_engine(max_batch_tokens=8)
    engine.submit(request("score", prompt_of(19), 0, prompt_logprobs=0))
    (output,) = run(engine)["score"]
    assert output.finish_reason == "length"
    assert output.token_ids == ()
    assert output.prompt_logprobs[0] is None
    assert [told.token_id for told in output.prompt_logprobs[1:]] == list(prompt_of(19)[1:])


def test_prompt_logprobs_survive_a_preemption():
    engine = fake_engine(num_blocks=10, max_num_seqs=3, max_batch_tokens=6, caching=False)
    for i in range(3):
        engine.submit(request(str(i), prompt_of(9, i), 12, prompt_logprobs=0))
    outputs = run(engine)
    assert engine.stats().num_preemptions > 0
    for i in range(3):
        told = outputs[str(i)][0].prompt_logprobs
        assert [entry.token_id for entry in told[1:]] == list(prompt_of(9, i)[1:])


def test_requests_that_can_never_run_are_refused_at_once():
    engine = fake_engine(max_model_len=16)
    engine.submit(request("long", prompt_of(16)))
    engine.submit(request("empty", ()))
    engine.submit(request("unknown", prompt_of(3), adapter="nobody"))
    engine.submit(request("twice", prompt_of(3)))
    engine.submit(request("twice", prompt_of(3)))
    outputs = run(engine)
    assert "16 tokens" in outputs["long"][0].error
    assert "no tokens" in outputs["empty"][0].error
    assert "not registered" in outputs["unknown"][0].error
    assert "in use" in outputs["twice"][0].error


def test_the_context_ends_an_answer():
    engine = fake_engine(max_model_len=16)
    engine.submit(request("a", prompt_of(10), 100))
    outputs = run(engine)["a"]
    assert len(tokens(outputs)) == 6
    assert outputs[-1].finish_reason == "length"


def test_a_broken_row_ends_its_own_request_only():
    engine = fake_engine(runner=FakeRunner(64, nan_for={"bad"}))
    engine.submit(request("good", prompt_of(5)))
    engine.submit(request("bad", prompt_of(5, 1)))
    outputs = run(engine)
    assert tokens(outputs["good"]) == expected(prompt_of(5), None, 6)
    assert outputs["bad"][-1].finish_reason == "error"
    assert engine.stats().kv_blocks_used == 0


def test_seeds_are_reproducible_and_independent_of_the_batch():
    drawn: dict[str, list[float]] = {}

    class Recorder(FakeRunner):
        def run(self, step):
            for chunk in step.chunks:
                if chunk.samples:
                    drawn.setdefault(chunk.sequence.id, []).append(chunk.sequence.uniform())
            return super().run(step)

    engine = fake_engine(runner=Recorder(64))
    engine.submit(request("alone", prompt_of(5), seed=7))
    run(engine)
    for name, seed in (("other", 8), ("batched", 7), ("unseeded", None)):
        engine.submit(request(name, prompt_of(5), seed=seed))
    run(engine)
    assert drawn["alone"] == drawn["batched"]
    assert drawn["alone"] != drawn["other"]
    assert drawn["unseeded"] not in (drawn["alone"], drawn["other"])


def test_priority_comes_before_arrival():
    runner = FakeRunner(64)
    engine = fake_engine(runner=runner, max_num_seqs=1)
    engine.submit(request("first", prompt_of(3)))
    engine.submit(Submit("urgent", prompt_of(3, 1), SamplingParams(max_tokens=2, temperature=0.0), priority=-1))
    run(engine)
    assert runner.rows_of_steps[0][0][0] == "urgent"


# --- adapters -----------------------------------------------------------------------------------------------------


def test_a_request_that_waits_for_its_adapter_blocks_nobody():
    engine = fake_engine(residency=FakeResidency(delay=10))
    engine.register_adapter("cold", "")
    engine.submit(request("cold", prompt_of(5), adapter="cold"))
    engine.submit(request("base", prompt_of(5)))
    order = list(run(engine))
    assert order == ["base", "cold"]


def test_five_hundred_adapters_with_room_for_eight():
    residency = FakeResidency(room=8)
    engine = fake_engine(residency=residency, num_blocks=256, max_num_seqs=16)
    jobs = [request(f"r{i}", prompt_of(6, i), 3, adapter=f"v{i}") for i in range(500)]
    for job in jobs:
        engine.register_adapter(name_of(job.adaptation), "")
        engine.submit(job)
    outputs = run(engine, 20000)
    for job in jobs:
        assert tokens(outputs[job.request_id]) == expected(job.prompt_token_ids, name_of(job.adaptation), 3)
    assert len(residency.device) <= 8


def test_a_cold_adapter_is_not_starved_by_hot_ones():
    engine = fake_engine(residency=FakeResidency(room=1), max_num_seqs=4, num_blocks=256)
    engine.register_adapter("hot", "")
    engine.register_adapter("cold", "")
    engine.submit(request("h0", prompt_of(4), 10, adapter="hot"))
    engine.step()
    engine.step()
    engine.submit(request("cold", prompt_of(4, 9), 2, adapter="cold"))
    finished = []
    for i in range(1, 60):
        engine.submit(request(f"h{i}", prompt_of(4, i), 10, adapter="hot"))
        finished += [output.request_id for output in engine.step().outputs if output.finish_reason]
    assert "cold" in finished[:4]


def test_an_adapter_that_cannot_be_loaded_fails_its_requests_only():
    engine = fake_engine(residency=FakeResidency(broken={"bad": "its file is gone"}))
    engine.register_adapter("bad", "")
    engine.submit(request("bad", prompt_of(5), adapter="bad"))
    engine.submit(request("good", prompt_of(5)))
    outputs = run(engine)
    assert outputs["bad"][0].error == "the adapter cannot be loaded: its file is gone"
    assert tokens(outputs["good"]) == expected(prompt_of(5), None, 6)
    engine.submit(request("again", prompt_of(5), adapter="bad"))
    assert "its file is gone" in run(engine)["again"][0].error


def test_limits_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="max_batch_tokens"):
        fake_engine(max_batch_tokens=4, max_num_seqs=8)


def test_random_traffic_always_answers_as_alone():
    source = random.Random(5)
    engine = fake_engine(num_blocks=40, max_num_seqs=6, max_batch_tokens=12, residency=FakeResidency(room=3, delay=2))
    for i in range(6):
        engine.register_adapter(f"v{i}", "")
    jobs: dict[str, Submit] = {}
    outputs: dict[str, list[SequenceOutput]] = {}
    aborted = set()
    for step in range(600):
        if step < 400 and source.random() < 0.3:
            adapter = source.choice([None, *(f"v{i}" for i in range(6))])
            # Few prompts, so that prefixes meet.
            job = request(f"j{step}", prompt_of(source.randrange(1, 40), source.randrange(3)), source.randrange(1, 20))
            job = Submit(job.request_id, job.prompt_token_ids, job.sampling, Adaptation.of(adapter))
            jobs[job.request_id] = job
            engine.submit(job)
        if jobs and source.random() < 0.05:
            name = source.choice(list(jobs))
            aborted.add(name)
            engine.abort(name)
        for output in engine.step().outputs:
            outputs.setdefault(output.request_id, []).append(output)
    for name, told in run(engine).items():
        outputs.setdefault(name, []).extend(told)
    assert len(jobs) > 80
    for name, job in jobs.items():
        wanted = expected(job.prompt_token_ids, name_of(job.adaptation), job.sampling.max_tokens)
        got = tokens(outputs.get(name, []))
        assert got == wanted or (name in aborted and got == wanted[: len(got)])
    assert engine.stats().kv_blocks_used == 0


# --- several adapters ---------------------------------------------------------------------------------------------


def adapted(name: str, seed: int, adaptation: Adaptation, num_tokens: int = 3) -> Submit:
    return Submit(name, prompt_of(6, seed), SamplingParams(max_tokens=num_tokens, temperature=0.0), adaptation)


def test_blends_and_routed_requests_are_keyed_by_what_adapts_them():
    engine = fake_engine()
    for version in ("a", "b", "g"):
        engine.register_adapter(version, "")
    engine.register_gate_set("g", None, ("a", "b"), null=True)
    adaptations = [
        Adaptation((("a", 0.5), ("b", 0.5))),
        Adaptation((("a", 0.25), ("b", 0.75))),
        Adaptation(routing=Routing("g", ("a", "b", BASE_COLUMN), 2, 1.0)),
        Adaptation(routing=Routing("g", ("a", None, BASE_COLUMN), 2, 1.0)),
        Adaptation.of("a"),
        Adaptation(),
    ]
    for _ in range(2):  # the second time from the prefix cache
        for i, adaptation in enumerate(adaptations):
            engine.submit(Submit(str(i), prompt_of(20), SamplingParams(max_tokens=4, temperature=0.0), adaptation))
        outputs = run(engine)
        for i, adaptation in enumerate(adaptations):
            assert tokens(outputs[str(i)]) == expected(prompt_of(20), name_of(adaptation), 4)
    assert outputs["0"][0].cached_tokens > 0


def test_sets_of_adapters_that_share_too_little_room_all_get_their_turn():
    residency = FakeResidency(room=4)
    engine = fake_engine(num_blocks=256, residency=residency)
    for i in range(8):
        engine.register_adapter(f"v{i}", "")
    jobs = [
        adapted(f"r{i}", i, Adaptation(tuple((f"v{(i + j) % 8}", 1.0) for j in range(1 + i % 4)))) for i in range(40)
    ]
    for job in jobs:
        engine.submit(job)
    outputs = run(engine, 20000)
    for job in jobs:
        assert tokens(outputs[job.request_id]) == expected(job.prompt_token_ids, name_of(job.adaptation), 3)
    assert not any(residency.users.values())


def test_one_adapter_of_a_blend_that_cannot_be_loaded_fails_the_request():
    engine = fake_engine(residency=FakeResidency(broken={"bad": "its file is gone"}))
    for version in ("good", "bad"):
        engine.register_adapter(version, "")
    engine.submit(adapted("r", 1, Adaptation((("good", 1.0), ("bad", 1.0)))))
    engine.submit(adapted("other", 2, Adaptation.of("good")))
    outputs = run(engine)
    assert outputs["r"][0].error == "the adapter cannot be loaded: its file is gone"
    assert len(tokens(outputs["other"])) == 3


def test_a_gate_set_nobody_registered_is_refused():
    engine = fake_engine()
    engine.submit(adapted("r", 1, Adaptation(routing=Routing("unknown", (BASE_COLUMN,), 1, 1.0))))
    assert run(engine)["r"][0].error == "version unknown is not registered"


def test_broken_shares_stay_out_of_the_sums():
    """A row whose numbers are not finite ends with an error; what it chose must not poison the counters."""
    runner = FakeRunner(64)
    shares = iter([(math.nan, 1.0), (0.25, 0.75)])

    def run_with_shares(step: ScheduledStep) -> tuple[ChunkResult, ...]:
        results = FakeRunner.run(runner, step)
        told = next(shares, (0.0, 1.0))
        routed = RoutedChunk(told, (0.0, 0.0), told, 0.5)
        return tuple(replace(result, routed=routed) for result in results)

    engine = fake_engine(runner=runner)
    runner.run = run_with_shares
    for version in ("a", "g"):
        engine.register_adapter(version, "")
    adaptation = Adaptation(routing=Routing("g", ("a", BASE_COLUMN), 1, 1.0))
    sampling = SamplingParams(max_tokens=3, temperature=0.0)
    engine.submit(Submit("r", prompt_of(4), sampling, adaptation, report_routing=True))
    outputs = run(engine)["r"]
    assert len(tokens(outputs)) == 3
    assert outputs[0].routing.prompt is None, "nothing is known of the prompt"
    assert dict(engine.stats().routed_tokens) == {"a": 0.25, BASE_COLUMN: 1.75}
    engine.forget_adapter("a")
    assert dict(engine.stats().routed_tokens) == {BASE_COLUMN: 1.75}

"""Drafts in the engine over the fake model: answers stay what they are, and come in fewer steps."""

import random
from dataclasses import replace

import pytest

from perseid_server.engine.adaptation import BASE_COLUMN, Adaptation, Routing
from perseid_server.engine.engine import Engine
from perseid_server.engine.messages import ROUTED, SequenceOutput, SpeculationStats, Submit
from perseid_server.engine.sequence import Sequence
from perseid_server.model.sampling_params import SamplingParams
from perseid_server.speculation.draft import Candidates
from perseid_server.speculation.options import Speculation
from tests.fakes import BLOCK_SIZE, EOS, FakeHeads, FakeRunner, expected, fake_engine, name_of
from tests.server.engine.test_engine import prompt_of, run, tokens

MEDUSA = Speculation("medusa", "heads")
STEEP = {1: 1.0, 2: 2.0, 64: 64.0}  # a row costs what a token does


def job(name: str, length: int = 9, num_tokens: int = 20, adapter: str | None = None, **changes: object) -> Submit:
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0)
    request = Submit(name, prompt_of(length), sampling, Adaptation.of(adapter), speculation=MEDUSA)
    return replace(request, **changes)  # type: ignore[arg-type]


def drafting_engine(heads: FakeHeads | None = None, **options: object) -> Engine:
    engine = fake_engine(heads=heads or FakeHeads(), **options)  # type: ignore[arg-type]
    engine.register_heads("heads", "")
    engine.step()
    return engine


def stats(engine: Engine, label: str = "") -> SpeculationStats:
    return next(found for found in engine.stats().speculation if found.adapter == label)


def told(outputs: list[SequenceOutput]) -> tuple[int, int]:
    """(drafted, accepted)"""
    return sum(each.drafted_tokens for each in outputs), sum(each.accepted_tokens for each in outputs)


@pytest.mark.parametrize("wrong", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("draft_tokens", [None, 1, 3, 12, 63])
def test_an_answer_is_what_it_is_without_drafts(wrong: float, draft_tokens: int | None) -> None:
    runner = FakeRunner(64)
    engine = drafting_engine(FakeHeads(wrong=wrong), runner=runner, draft_tokens=draft_tokens, max_batch_tokens=256)
    engine.submit(job("a", num_tokens=30))
    outputs = run(engine)["a"]
    assert tokens(outputs) == expected(prompt_of(9), None, 30)
    assert outputs[-1].finish_reason == "length"
    assert engine.stats().kv_blocks_used == 0
    drafted, accepted = told(outputs)
    assert (stats(engine).drafted, stats(engine).accepted) == (drafted, accepted)
    assert stats(engine).tokens == stats(engine).steps + accepted == 29, "the first token comes with the prompt"
    if wrong == 0.0:
        assert len(outputs) < 20
        assert accepted > 10


def test_all_kinds_of_requests_together_answer_as_each_alone() -> None:
    engine = drafting_engine(num_blocks=200, max_num_seqs=16, max_batch_tokens=200)
    engine.register_adapter("a", "")
    engine.register_adapter("b", "")
    kinds = [
        MEDUSA,
        Speculation("ngram"),
        Speculation("auto", "heads"),
        Speculation("off"),
        Speculation("medusa", "no"),
    ]
    jobs = [
        job(str(place), 3 + 5 * (place % 7), 5 + place, [None, "a", "b"][place % 3], speculation=kinds[place % 5])
        for place in range(16)
    ]
    for each in jobs:
        engine.submit(each)
    outputs = run(engine)
    for each in jobs:
        found = outputs[each.request_id]
        assert tokens(found) == expected(each.prompt_token_ids, name_of(each.adaptation), each.sampling.max_tokens)
        if each.speculation.mode == "off" or each.speculation.heads == "no":
            assert told(found) == (0, 0)
    assert engine.stats().kv_blocks_used == 0


def test_preempted_requests_answer_the_same() -> None:
    engine = drafting_engine(num_blocks=12, max_num_seqs=4, caching=False, draft_tokens=5)
    for place in range(4):
        engine.submit(job(str(place), 8, 20, prompt_token_ids=prompt_of(8, place)))
    outputs = run(engine)
    assert engine.stats().num_preemptions > 0
    for place in range(4):
        assert tokens(outputs[str(place)]) == expected(prompt_of(8, place), None, 20)
    assert engine.stats().kv_blocks_used == 0


def test_drafts_preempt_nobody_and_take_no_block_for_long() -> None:
    """Two sequences fill the cache to the last block; there is room for drafts only within the blocks they have."""
    engine = drafting_engine(FakeHeads(wrong=1.0), num_blocks=6, caching=False, draft_tokens=9)
    for name in "ab":
        engine.submit(job(name, 6, 6))
    while engine.has_work:
        engine.step()
        held = engine.stats().kv_blocks_used
        assert held <= 6
    assert engine.stats().num_preemptions == 0


def test_rejected_drafts_blocks_go_back_at_once() -> None:
    engine = drafting_engine(FakeHeads(wrong=1.0), draft_tokens=30, max_batch_tokens=256)
    engine.submit(job("a", 4, 8))
    engine.step()
    length = 4 + 1
    while engine.has_work:
        length += sum(len(output.token_ids) for output in engine.step().outputs)
        assert engine.stats().kv_blocks_used <= -(-length // BLOCK_SIZE)


def test_what_later_requests_find_cached_is_right() -> None:
    engine = drafting_engine(draft_tokens=6)
    engine.submit(job("first", 9, 20))
    answer = tokens(run(engine)["first"])
    longer = (*prompt_of(9), *answer)
    engine.submit(job("second", speculation=Speculation("off"), prompt_token_ids=longer))
    outputs = run(engine)["second"]
    assert outputs[0].cached_tokens == 28
    assert tokens(outputs) == expected(longer, None, 20)


@pytest.mark.parametrize("place", range(1, 9))
def test_an_end_token_within_an_accepted_path_ends_it(place: int) -> None:
    """Whatever had been drafted beyond is dropped."""
    coming = expected(prompt_of(9), None, 20)
    stop = coming[place]
    first = coming.index(stop)
    engine = drafting_engine(FakeHeads(wrong=0.0), draft_tokens=6)
    engine.submit(job("a", sampling=SamplingParams(max_tokens=20, temperature=0.0, stop_token_ids=(stop,))))
    outputs = run(engine)["a"]
    assert tokens(outputs) == coming[:first]
    assert (outputs[-1].finish_reason, outputs[-1].stop_token_id) == ("stop", stop)
    assert all(each.accepted_tokens <= len(each.token_ids) for each in outputs)


def test_the_models_own_end_is_kept() -> None:
    engine = drafting_engine(FakeHeads(wrong=0.0), runner=FakeRunner(64, says="to be or not to be or not to be"))
    engine.submit(job("a", num_tokens=60, speculation=Speculation("ngram")))
    outputs = run(engine)["a"]
    assert bytes(tokens(outputs)).decode() == "to be or not to be or not to be"
    assert outputs[-1].stop_token_id == EOS
    assert told(outputs)[1] > 8, "it repeats itself"


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5])
def test_no_more_than_max_tokens(num_tokens: int) -> None:
    runner = FakeRunner(64)
    engine = drafting_engine(FakeHeads(wrong=0.0), runner=runner, draft_tokens=20)
    engine.submit(job("a", num_tokens=num_tokens))
    outputs = run(engine)["a"]
    assert tokens(outputs) == expected(prompt_of(9), None, num_tokens)
    depths = [max(chunk.draft.tree.depths) for step in runner.steps for chunk in step.chunks if chunk.draft]
    assert all(depth < num_tokens for depth in depths)


def test_no_further_than_the_longest_sequence() -> None:
    engine = drafting_engine(FakeHeads(wrong=0.0), max_model_len=16, draft_tokens=9)
    engine.submit(job("a", num_tokens=100))
    outputs = run(engine)["a"]
    assert tokens(outputs) == expected(prompt_of(9), None, 7)
    assert outputs[-1].finish_reason == "length"


def test_drafts_leave_room_for_prefills() -> None:
    runner = FakeRunner(64)
    engine = drafting_engine(runner=runner, draft_tokens=40, max_batch_tokens=16, max_num_seqs=4)
    engine.submit(job("a", 3, 30))
    engine.step()
    engine.submit(job("b", 60, 2))
    run(engine)
    drafted = [sum(len(chunk.draft.tree) for chunk in step.chunks if chunk.draft is not None) for step in runner.steps]
    assert max(drafted) == 16 // 4
    assert all(step.num_rows <= 16 for step in runner.steps)
    prefills = [chunk.count for step in runner.steps for chunk in step.chunks if chunk.sequence.id == "b"]
    assert max(prefills) == 15, "a prefill goes first"


def test_where_a_row_costs_a_token_nothing_is_drafted() -> None:
    engine = drafting_engine(FakeHeads(wrong=0.5), step_times=STEEP, max_batch_tokens=256)
    engine.submit(job("a", num_tokens=100, sampling=SamplingParams(max_tokens=100, temperature=0.0)))
    assert told(run(engine)["a"]) == (0, 0)


def test_heads_that_do_not_pay_are_left_alone() -> None:
    heads = FakeHeads(wrong=1.0)
    engine = drafting_engine(heads, num_blocks=200, step_times={1: 1e-3, 2: 1.7e-3, 64: 45e-3}, max_model_len=700)
    engine.submit(job("a", num_tokens=600))
    run(engine)
    assert 5 < len(heads.asked) < 200


def test_drafts_beside_a_prefill_that_fills_the_step_hold_no_blocks_and_preempt_nobody() -> None:
    """No row is left for them: nothing is taken for what is not drafted."""
    for draft_tokens in (None, 9, 0):
        engine = drafting_engine(FakeHeads(wrong=0.3), num_blocks=80, draft_tokens=draft_tokens, max_batch_tokens=16)
        engine.submit(job("a", 4, 40))
        engine.submit(job("b", 5, 40))
        for _ in range(3):
            engine.step()
        engine.submit(job("c", 200, 2))
        while engine.has_work:
            engine.step()
            for sequence in engine._scheduler.running:
                assert len(sequence.blocks) <= -(-len(sequence.token_ids) // BLOCK_SIZE)
        assert engine.stats().num_preemptions == 0


@pytest.mark.parametrize("max_batch_tokens", [1, 2, 3])
def test_steps_too_small_for_drafts(max_batch_tokens: int) -> None:
    heads = FakeHeads()
    engine = drafting_engine(heads, max_batch_tokens=max_batch_tokens, max_num_seqs=1, draft_tokens=9)
    engine.submit(job("a", 4, 12))
    outputs = run(engine)["a"]
    assert tokens(outputs) == expected(prompt_of(4), None, 12)
    assert told(outputs) == (0, 0)
    assert heads.asked == []


class BrokenHeads(FakeHeads):
    """They raise when they are asked."""

    def propose(self, sequences: list[Sequence]) -> list[Candidates]:
        raise MemoryError("no memory for the heads")


def test_heads_that_raise_cost_drafts_only() -> None:
    engine = drafting_engine(BrokenHeads())
    engine.submit(job("a"))
    engine.submit(job("b", adapter=None, num_tokens=7))
    outputs = run(engine)
    assert tokens(outputs["a"]) == expected(prompt_of(9), None, 20)
    assert tokens(outputs["b"]) == expected(prompt_of(9), None, 7)
    assert told(outputs["a"]) == (0, 0)


def test_only_what_a_step_has_counted_is_told() -> None:
    """A server may have seen thousands of adapters."""
    engine = drafting_engine(FakeHeads(wrong=0.2))
    for name in ("a", "b"):
        engine.register_adapter(name, "")
        engine.submit(job(name, adapter=name))
        run(engine)
        assert [each.adapter for each in engine.stats().speculation] == [name]
    engine.step()
    assert engine.stats().speculation == ()


def test_no_rows_beyond_the_longest_sequence() -> None:
    """Its blocks, and recorded steps, have room for no more."""
    runner = FakeRunner(64)
    engine = drafting_engine(
        FakeHeads(wrong=1.0), runner=runner, max_model_len=24, draft_tokens=30, max_batch_tokens=256
    )
    engine.submit(job("a", num_tokens=100))
    run(engine)
    assert max(chunk.start + chunk.num_rows for step in runner.steps for chunk in step.chunks) <= 24


def test_draft_tokens_zero_means_never() -> None:
    heads = FakeHeads()
    engine = drafting_engine(heads, draft_tokens=0)
    engine.submit(job("a"))
    assert told(run(engine)["a"]) == (0, 0)
    assert heads.asked == []


def test_drafting_begins_when_the_heads_have_come_and_ends_when_they_go() -> None:
    heads = FakeHeads(wrong=0.0)
    engine = fake_engine(heads=heads)
    engine.submit(job("a", num_tokens=40))
    for _ in range(3):
        engine.step()
    assert heads.asked == []
    engine.register_heads("heads", "")
    moved = [state for _ in range(3) for state in engine.step().adapters]
    assert [(state.version, state.location) for state in moved] == [("heads", "device")]
    assert heads.asked
    engine.forget_heads("heads")
    count = len(heads.asked)
    outputs = run(engine)["a"]
    assert len(heads.asked) == count
    assert outputs[-1].finish_reason == "length"


def test_a_step_that_fails_with_drafts_costs_one_request() -> None:
    runner = FakeRunner(64)
    engine = drafting_engine(runner=runner, draft_tokens=4)
    engine.submit(job("old"))
    engine.submit(job("new"))
    for _ in range(3):
        engine.step()
    runner.fail_on = {"new"}
    outputs = run(engine)
    assert "ran out of memory" in outputs["new"][-1].error
    assert outputs["old"][-1].finish_reason == "length"
    assert engine.stats().kv_blocks_used == 0


def test_routed_requests_count_accepted_rows_only() -> None:
    columns = ("a", "b", BASE_COLUMN)
    routed = Adaptation(routing=Routing("g", columns, 2, 1.0))
    engine = drafting_engine(FakeHeads(wrong=0.5), draft_tokens=6)
    engine.register_adapter("a", "")
    engine.register_adapter("b", "")
    engine.register_gate_set("g", None, ("a", "b"), null=True)
    engine.submit(job("r", 9, 20, adaptation=routed, report_routing=True))
    outputs = run(engine)["r"]
    shares = dict(engine.stats().routed_tokens)
    assert sum(shares.values()) == pytest.approx(9 + 19), "the last token is not computed"
    reports = [share for output in outputs if output.routing for share in output.routing.tokens]
    assert len(reports) == 20
    assert stats(engine, ROUTED).accepted > 0


def test_random_churn_changes_no_answer() -> None:
    source = random.Random(11)
    engine = drafting_engine(
        FakeHeads(wrong=0.4), num_blocks=40, max_num_seqs=6, max_batch_tokens=24, step_times={1: 1.0, 4: 1.2, 64: 9.0}
    )
    engine.register_adapter("a", "")
    modes = [MEDUSA, Speculation("auto", "heads"), Speculation("ngram"), Speculation("off")]
    wanted: dict[str, tuple[int, ...]] = {}
    outputs: dict[str, list[SequenceOutput]] = {}
    for turn in range(300):
        if source.random() < 0.25:
            adapter, length, count = source.choice([None, "a"]), source.randrange(1, 30), source.randrange(1, 25)
            each = job(str(turn), length, count, adapter, speculation=source.choice(modes))
            engine.submit(each)
            wanted[str(turn)] = expected(each.prompt_token_ids, adapter, count)
        if source.random() < 0.03 and wanted:
            gone = source.choice(list(wanted))
            engine.abort(gone)
            wanted.pop(gone)
        for output in engine.step().outputs:
            outputs.setdefault(output.request_id, []).append(output)
    for name, found in run(engine).items():
        outputs.setdefault(name, []).extend(found)
    assert len(wanted) > 40
    for name, answer in wanted.items():
        assert tokens(outputs[name]) == answer
    assert engine.stats().kv_blocks_used == 0

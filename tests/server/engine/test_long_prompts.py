"""A prompt that takes many steps leaves something of each to short ones, and nobody loses by it."""

from perseid_server.engine.engine import Engine
from perseid_server.engine.messages import Submit
from perseid_server.model.sampling_params import SamplingParams
from tests.fakes import FakeRunner, expected, fake_engine
from tests.server.engine.test_engine import prompt_of, run, tokens
from tests.server.engine.test_fairness import job

STEP = 32  # tokens
PART = STEP - STEP // 4
LONG = 400  # tokens: thirteen steps


def new_engine(**limits: int) -> tuple[Engine, FakeRunner]:
    runner = FakeRunner(512)
    return fake_engine(num_blocks=512, runner=runner, **{"max_batch_tokens": STEP, "max_num_seqs": 8, **limits}), runner


def rows(runner: FakeRunner, step: int = -1) -> dict[str, int]:
    return dict(runner.rows_of_steps[step])


def test_a_short_prompt_does_not_wait_for_the_end_of_a_long_one():
    engine, runner = new_engine()
    engine.submit(job("long", length=LONG))
    engine.step()
    assert rows(runner) == {"long": STEP}
    engine.submit(job("short", length=6, num_tokens=3))
    (answer,) = engine.step().outputs
    assert answer.request_id == "short", "in the very next step"
    assert rows(runner) == {"long": STEP - 6, "short": 6}
    outputs = run(engine)
    assert tokens([answer, *outputs["short"]]) == expected(prompt_of(6, sum(b"short")), None, 3)
    assert tokens(outputs["long"]) == expected(prompt_of(LONG, sum(b"long")), None, 8)


def test_a_flood_of_short_ones_leaves_a_long_one_the_larger_part():
    engine, runner = new_engine(max_num_seqs=STEP)
    engine.submit(job("long", length=LONG))
    engine.step()
    for number in range(200):
        engine.submit(job(f"s{number}", length=4, num_tokens=1))
    for left in range(LONG - STEP, STEP, -PART):
        engine.step()
        assert rows(runner)["long"] == PART, left
        assert len(rows(runner)) > 1


def test_what_nobody_may_take_stays_with_the_prompt_that_was_begun():
    engine, runner = new_engine()
    for name in ("first", "second"):
        engine.submit(job(name, length=LONG))
    for _ in range(LONG // STEP):
        engine.step()
        assert rows(runner) == {"first": STEP}
    engine.step()
    assert rows(runner) == {"first": LONG % STEP, "second": STEP - LONG % STEP}


def test_a_rest_that_fits_into_the_step_is_read_as_a_whole():
    engine, runner = new_engine()
    engine.submit(job("long", length=STEP + 30))
    engine.step()
    for number in range(3):
        engine.submit(job(f"s{number}", length=4))
    engine.step()
    assert rows(runner) == {"long": 30, "s0": 2}


def test_who_has_been_served_more_does_not_pass():
    engine, runner = new_engine()
    engine.submit(job("before", length=8, num_tokens=40, tenant="greedy"))
    engine.submit(job("long", length=LONG, tenant="modest", weight=1000.0))
    engine.step()
    engine.submit(job("short", length=4, tenant="greedy"))
    engine.step()
    assert rows(runner) == {"before": 1, "long": STEP - 1}
    engine.submit(job("urgent", length=4, tenant="greedy", priority=-1))
    engine.step()
    assert rows(runner) == {"before": 1, "long": STEP - 5, "urgent": 4}


def test_one_that_was_preempted_is_not_passed():
    engine, runner = new_engine()
    engine.submit(job("victim", length=100))
    for _ in range(5):
        engine.step()
    engine.submit(job("long", length=LONG))
    engine.step()
    assert set(rows(runner)) == {"victim", "long"}
    engine._scheduler._preempt(engine._sequences["victim"])
    engine._blocks._block_of.clear()  # all of it is to be computed again
    engine.submit(job("short", length=4))
    engine.step()
    assert rows(runner) == {"long": STEP}
    assert set(run(engine)) == {"victim", "long", "short"}


def test_a_prompt_keeps_its_blocks_through_a_step_that_had_room_for_one_of_its_tokens():
    engine, runner = new_engine(max_batch_tokens=8)
    for number in range(7):
        engine.submit(job(f"d{number}", length=1, num_tokens=50))
        engine.step()
    engine.submit(job("long", length=40))
    for _ in range(3):
        engine.step()
        assert rows(runner)["long"] == 1
        assert len(engine._sequences["long"].blocks) == engine._blocks.blocks_for(40)


def test_a_prompt_with_one_token_left_keeps_the_block_for_it():
    engine, runner = new_engine()
    engine.submit(job("long", length=STEP + 1))
    engine.step()
    assert rows(runner) == {"long": STEP}
    assert len(engine._sequences["long"].blocks) == engine._blocks.blocks_for(STEP + 1)
    assert tokens(run(engine)["long"]) == expected(prompt_of(STEP + 1, sum(b"long")), None, 8)


class Lookups(dict[bytes, int]):
    """The blocks by key, and how often one was looked for."""

    count = 0

    def get(self, key: bytes, default: int | None = None) -> int | None:  # type: ignore[override]
        self.count += 1
        return super().get(key, default)


def count_lookups(engine: Engine) -> Lookups:
    engine._blocks._block_of = lookups = Lookups(engine._blocks._block_of)
    return lookups


def behind_a_long_one(tenant: str) -> tuple[Engine, FakeRunner, Lookups]:
    """Prompts of a known prefix of many blocks, which all have more to compute than a step has tokens."""
    engine, runner = new_engine()
    known = prompt_of(160, 1)
    engine.submit(Submit("known", known, SamplingParams(max_tokens=1, temperature=0.0)))
    run(engine)
    engine.submit(job("served", length=8, num_tokens=40, tenant="greedy"))
    engine.submit(job("long", length=LONG, tenant="modest", weight=1000.0))
    engine.step()
    for number in range(6):
        prompt = (*known, *prompt_of(100, number))
        engine.submit(Submit(f"w{number}", prompt, SamplingParams(max_tokens=1, temperature=0.0), tenant=tenant))
    return engine, runner, count_lookups(engine)


def test_prompts_that_do_not_fit_behind_a_long_one_cost_one_lookup_each():
    engine, runner, lookups = behind_a_long_one("modest")
    engine.step()
    lookups.count = 0
    engine.step()
    assert rows(runner) == {"served": 1, "long": STEP - 1}
    assert lookups.count == 6


def test_nothing_is_looked_up_for_who_has_been_served_more():
    engine, runner, lookups = behind_a_long_one("greedy")
    engine.step()
    assert rows(runner) == {"served": 1, "long": STEP - 1}
    assert lookups.count == 0


def test_a_prefix_is_looked_up_once_for_a_prompt_that_starts():
    engine, _ = new_engine()
    engine.submit(job("first", length=160, num_tokens=1))
    run(engine)
    lookups = count_lookups(engine)
    engine.submit(Submit("again", prompt_of(160, sum(b"first")), SamplingParams(max_tokens=1, temperature=0.0)))
    (output,) = engine.step().outputs
    assert output.cached_tokens == 156
    assert lookups.count == 39
    engine.submit(job("long", length=LONG))
    engine.step()
    engine.submit(Submit("passes", prompt_of(160, sum(b"first")), SamplingParams(max_tokens=1, temperature=0.0)))
    lookups.count = 0
    assert [each.request_id for each in engine.step().outputs] == ["passes"]
    assert lookups.count <= 40

"""What an operator is told of the engine: who runs, who waits for what, and what is where."""

from perseid_server.engine.engine import Engine
from perseid_server.engine.messages import Submit
from perseid_server.engine.state import EngineState, SequenceState
from tests.fakes import BLOCK_SIZE, FakeResidency, fake_engine
from tests.server.engine.test_engine import prompt_of, request

LIMIT = 100


def stages(state: EngineState) -> dict[str, str]:
    return {one.request_id: one.stage for one in state.sequences}


def submit(engine: Engine, *requests: Submit) -> None:
    for one in requests:
        engine.submit(one)


def test_an_idle_engine():
    told = fake_engine(num_blocks=8).describe(LIMIT)
    assert (told.num_running, told.num_waiting, told.sequences, told.residents) == (0, 0, (), ())
    assert (told.kv_blocks_total, told.kv_blocks_used, told.kv_blocks_cached, told.kv_block_tokens) == (8, 0, 0, 4)


def test_sequences_and_what_they_wait_for():
    engine = fake_engine(
        num_blocks=14, max_num_seqs=4, max_batch_tokens=16, residency=FakeResidency(room=1, delay=1000), caching=False
    )
    engine.register_adapter("slow", "")
    submit(engine, request("first", prompt_of(8)), request("second", prompt_of(24)))
    for _ in range(2):  # the second prompt is read in two steps
        engine.step()
    submit(engine, request("cold", prompt_of(4), adapter="slow"), request("large", prompt_of(40)))
    engine.step()
    submit(engine, request("new", prompt_of(4)))
    told = engine.describe(LIMIT)
    assert stages(told) == {
        "first": "decode", "second": "decode", "cold": "adapters", "large": "kv_blocks", "new": "turn"
    }  # fmt: skip
    assert [one.request_id for one in told.sequences][:2] == ["first", "second"]
    assert (told.num_running, told.num_waiting) == (2, 3)
    first = told.sequences[0]
    assert first == SequenceState("first", "", "decode", (), 8, 10, 3, 3, first.age_s)
    assert first.age_s > 0
    assert told.kv_blocks_used == sum(one.kv_blocks for one in told.sequences)


def test_a_long_prompt_that_is_read():
    engine = fake_engine(max_batch_tokens=8)
    submit(engine, request("long", prompt_of(30)))
    engine.step()
    (long,) = engine.describe(LIMIT).sequences
    assert (long.stage, long.computed_tokens, long.generated_tokens) == ("prefill", 8, 0)


def test_looking_changes_nothing_and_is_cut():
    def answers(*, look: bool) -> list:
        engine = fake_engine(num_blocks=40, max_num_seqs=2)
        submit(engine, *(request(str(i), prompt_of(4 + i, i)) for i in range(9)))
        told = []
        while engine.has_work:
            told += [(one.request_id, one.token_ids) for one in engine.step().outputs]
            if look:
                state = engine.describe(3)
                assert len(state.sequences) == min(3, state.num_running + state.num_waiting)
        return told

    assert answers(look=True) == answers(look=False)


def test_residency_and_cached_blocks():
    engine = fake_engine(num_blocks=16, residency=FakeResidency(room=3))
    for version in ("a", "b", "c", "d"):
        engine.register_adapter(version, "")
    submit(engine, request("x", prompt_of(2 * BLOCK_SIZE), 2, adapter="b"))
    while engine.has_work:
        engine.step()
    submit(engine, request("y", prompt_of(4), adapter="d"))
    engine.step()
    told = engine.describe(2)
    assert [(one.version, one.location, one.is_loading) for one in told.residents] == [
        ("d", "disk", True), ("b", "device", False)
    ]  # fmt: skip
    assert dict(told.num_residents) == {"device": 1, "disk": 3}
    assert (told.num_loading, told.num_pinned, told.pages_used, told.pages_total) == (1, 0, 1, 3)
    assert (told.kv_blocks_used, told.kv_blocks_cached) == (0, 2)

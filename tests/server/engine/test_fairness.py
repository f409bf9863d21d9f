"""Nobody starves: shares of tenants and adapters, room for blocks and adapters, deadlines. All on the fake model."""

from collections import defaultdict
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perseid_server.engine import prefixes
from perseid_server.engine.adaptation import Adaptation
from perseid_server.engine.engine import Engine
from perseid_server.engine.fairness import Accounts, Shares
from perseid_server.engine.messages import SequenceOutput, Submit
from perseid_server.engine.scheduler import MOST_UNFIT, PATIENCE
from perseid_server.engine.sequence import Sequence
from perseid_server.model.sampling_params import SamplingParams
from tests.fakes import FakeResidency, FakeRunner, expected, fake_engine, name_of
from tests.server.engine.test_engine import prompt_of, run, tokens


def job(name: str, *, length: int = 8, num_tokens: int = 8, adapter: str | None = None, **fields: object) -> Submit:
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0)
    seed = sum(name.encode())
    return Submit(name, prompt_of(length, seed), sampling, Adaptation.of(adapter), **fields)  # type: ignore[arg-type]


@dataclass
class Traffic:
    """Steps an engine and writes down who got how many tokens in which step, and how long each one waited."""

    engine: Engine
    owner: dict[str, str] = field(default_factory=dict)  # request id → tenant or adapter
    served: list[dict[str, int]] = field(default_factory=list)  # by step: output tokens by owner
    submitted: dict[str, int] = field(default_factory=dict)  # step
    begun: dict[str, int] = field(default_factory=dict)  # step of the first token
    ended: dict[str, list[SequenceOutput]] = field(default_factory=lambda: defaultdict(list))

    def submit(self, request: Submit, owner: str = "") -> None:
        self.owner[request.request_id] = owner
        self.submitted[request.request_id] = len(self.served)
        self.engine.submit(request)

    def step(self) -> list[SequenceOutput]:
        outputs = self.engine.step().outputs
        counts: dict[str, int] = defaultdict(int)
        for output in outputs:
            counts[self.owner.get(output.request_id, "")] += len(output.token_ids)
            self.begun.setdefault(output.request_id, len(self.served))
            if output.finish_reason is not None:
                self.ended[output.request_id].append(output)
        self.served.append(counts)
        return list(outputs)

    def keep_waiting(self, owner: str, count: int, **fields: object) -> None:
        """Submit until so many of an owner's requests have not begun."""
        pending = [name for name in self.submitted if self.owner[name] == owner and name not in self.begun]
        for _ in range(count - len(pending)):
            self.submit(job(f"{owner}{len(self.submitted)}", **fields), owner)  # type: ignore[arg-type]

    def share(self, owner: str, first: int, last: int) -> float:
        window = self.served[first:last]
        return sum(counts[owner] for counts in window) / sum(sum(counts.values()) for counts in window)


# --- shares -------------------------------------------------------------------------------------------------------


def test_a_flood_leaves_the_other_tenant_its_half_of_every_window():
    traffic = Traffic(fake_engine(num_blocks=200, max_num_seqs=8))
    for _ in range(400):
        traffic.keep_waiting("flood", 60, tenant="flood", num_tokens=10)
        traffic.keep_waiting("small", 8, tenant="small", num_tokens=10)
        traffic.step()
    shares = [traffic.share("small", first, first + 60) for first in range(0, 340, 5)]
    assert min(shares) >= 0.45


def test_lengths_count_not_requests():
    """Long answers of one tenant against short ones of the other: tokens are shared, not places."""
    traffic = Traffic(fake_engine(num_blocks=400, max_num_seqs=8))
    for _ in range(500):
        traffic.keep_waiting("long", 10, tenant="long", num_tokens=40)
        traffic.keep_waiting("short", 10, tenant="short", num_tokens=40, length=2)
        traffic.step()
    assert 0.45 < traffic.share("short", 100, 500) < 0.62  # it has shorter prompts, so more output for its service


def test_weights_of_one_and_three_get_one_and_three():
    traffic = Traffic(fake_engine(num_blocks=200, max_num_seqs=8))
    for _ in range(400):
        traffic.keep_waiting("one", 20, tenant="one", weight=1.0)
        traffic.keep_waiting("three", 20, tenant="three", weight=3.0)
        traffic.step()
    one, three = (sum(counts[owner] for counts in traffic.served[40:]) for owner in ("one", "three"))
    assert 2.7 <= three / one <= 3.3


def test_adapters_of_a_tenant_share_its_part():
    traffic = Traffic(fake_engine(num_blocks=200, max_num_seqs=8))
    for name in ("hot", "cold"):
        traffic.engine.register_adapter(name, "")
    for _ in range(300):
        traffic.keep_waiting("hot", 40, tenant="a", adapter="hot")
        traffic.keep_waiting("cold", 2, tenant="a", adapter="cold")
        traffic.keep_waiting("other", 2, tenant="b")
        traffic.step()
    assert traffic.share("other", 40, 300) >= 0.45
    assert traffic.share("cold", 40, 300) >= 0.22


def test_idle_time_is_not_saved_up():
    traffic = Traffic(fake_engine(num_blocks=200, max_num_seqs=4))
    for _ in range(200):
        traffic.keep_waiting("busy", 10, tenant="busy")
        traffic.step()
    for _ in range(100):
        traffic.keep_waiting("busy", 10, tenant="busy")
        traffic.keep_waiting("late", 10, tenant="late")
        traffic.step()
    assert 0.4 < traffic.share("busy", 210, 300) < 0.6


def test_a_pause_does_not_forgive_and_what_is_paid_is_forgotten():
    accounts = Accounts()
    greedy, patient = accounts.enter("greedy"), accounts.enter("patient")
    accounts.wait(greedy)
    accounts.wait(patient)
    greedy.service += 100
    accounts.end_wait(greedy)
    accounts.leave(greedy)
    back = accounts.enter("greedy")
    accounts.wait(back)
    assert back.service == 100
    accounts.end_wait(back)
    accounts.leave(back)
    patient.service = 150
    new = accounts.enter("new")
    accounts.wait(new)
    assert new.service == 150
    assert len(accounts) == 2


def test_nobody_waits_long_among_twenty_adapters():
    """Zipf: the first adapter has twenty times the requests of the last. The pool holds eight."""
    traffic = Traffic(fake_engine(num_blocks=400, max_num_seqs=16, residency=FakeResidency(room=8, delay=2)))
    for rank in range(20):
        traffic.engine.register_adapter(f"v{rank}", "")
    number = 0
    for step in range(400):
        for rank in range(20):
            if step % (rank + 1) == 0 and step % 3 == 0:
                number += 1
                traffic.submit(job(f"r{number}", adapter=f"v{rank}", num_tokens=4, length=4), f"v{rank}")
        traffic.step()
    cold = [name for name, owner in traffic.owner.items() if int(owner[1:]) >= 5 and traffic.submitted[name] < 300]
    assert len(cold) > 50
    assert max(traffic.begun[name] - traffic.submitted[name] for name in cold) <= 60


# --- room for blocks ----------------------------------------------------------------------------------------------


def test_small_requests_pass_a_large_one_for_a_while_only():
    traffic = Traffic(fake_engine(num_blocks=40, max_num_seqs=8, max_model_len=160, caching=False))
    for _ in range(5):
        traffic.keep_waiting("small", 10, num_tokens=12)
        traffic.step()
    traffic.submit(job("large", length=140, num_tokens=2), "large")
    for _ in range(PATIENCE * 8):
        traffic.keep_waiting("small", 10, num_tokens=12)
        traffic.step()
        if "large" in traffic.begun:
            break
    passed = [name for name, step in traffic.begun.items() if step > traffic.submitted["large"] and name != "large"]
    assert len(passed) > 10, "places were used meanwhile"
    assert "large" in traffic.begun
    assert traffic.begun["large"] - traffic.submitted["large"] < 3 * PATIENCE


def test_preempted_requests_come_to_their_end_beside_an_endless_stream():
    traffic = Traffic(fake_engine(num_blocks=14, max_num_seqs=6, max_model_len=56, caching=False))
    traffic.submit(job("old", num_tokens=40, tenant="old"), "old")
    for _ in range(500):
        traffic.keep_waiting("new", 8, tenant="new", num_tokens=12)
        traffic.step()
    assert traffic.engine.stats().num_preemptions > 0
    assert traffic.ended["old"][0].finish_reason == "length"


def test_the_victim_is_of_the_tenant_that_was_served_most():
    engine = fake_engine(num_blocks=10, max_num_seqs=3, caching=False)
    engine.submit(job("greedy1", num_tokens=30, tenant="greedy"))
    engine.submit(job("greedy2", num_tokens=30, tenant="greedy"))
    engine.step()
    engine.submit(job("modest", num_tokens=4, tenant="modest"))
    while not engine.stats().num_preemptions:
        engine.step()
    assert [each.id for each in engine._scheduler.waiting] == ["greedy2"]


def test_a_sequence_larger_than_all_memory_ends_with_its_length():
    engine = fake_engine(num_blocks=4, max_model_len=100)
    engine.submit(job("a", length=8, num_tokens=90))
    assert run(engine)["a"][-1].finish_reason == "length"
    engine.submit(job("b", length=17))
    assert "may have 16" in run(engine)["b"][0].error


def test_prompts_that_wait_are_hashed_once(monkeypatch):
    hashed = []
    chain_key = prefixes.chain_key
    monkeypatch.setattr(prefixes, "chain_key", lambda *args: (hashed.append(args), chain_key(*args))[1])
    engine = fake_engine(num_blocks=30, max_num_seqs=8)
    engine.submit(job("a", length=80, num_tokens=30))
    engine.submit(job("b", length=80, num_tokens=30))
    run(engine)
    assert len(hashed) == len({(parent, tuple(block)) for parent, block in hashed})


# --- room for adapters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_cold", [1, 4])
def test_cold_adapters_get_room_while_requests_for_hot_ones_keep_coming(num_cold):
    residency = FakeResidency(room=4, delay=3)
    traffic = Traffic(fake_engine(num_blocks=400, max_num_seqs=8, residency=residency))
    hot, cold = [f"hot{i}" for i in range(4)], [f"cold{i}" for i in range(num_cold)]
    for name in (*hot, *cold):
        traffic.engine.register_adapter(name, "")

    def keep_hot() -> None:
        for name in hot:
            traffic.keep_waiting(name, 4, adapter=name, num_tokens=10)

    for _ in range(40):
        keep_hot()
        traffic.step()
    for name in cold:
        traffic.submit(job(name, adapter=name), name)
    for _ in range(100 * num_cold):
        keep_hot()
        traffic.step()
    waits = [traffic.begun[name] - traffic.submitted[name] for name in cold]
    assert max(waits) <= 30 * num_cold
    assert all(traffic.share(name, 0, 140) > 0.1 for name in hot)


def test_hot_adapters_and_the_base_go_on_while_a_cold_one_waits_for_room():
    residency = FakeResidency(room=2)
    engine = fake_engine(num_blocks=400, max_num_seqs=4, residency=residency)
    for name in ("a", "b", "cold"):
        engine.register_adapter(name, "")
    engine.submit(job("a1", adapter="a", num_tokens=60))
    engine.submit(job("b1", adapter="b", num_tokens=60))
    for _ in range(5):
        engine.step()
    engine.submit(job("cold", adapter="cold"))
    engine.submit(job("base", num_tokens=2))
    engine.step()
    engine.submit(job("a2", adapter="a", num_tokens=2))
    engine.submit(job("b2", adapter="b", num_tokens=2))
    ended = []
    for _ in range(12):
        ended += [output.request_id for output in engine.step().outputs if output.finish_reason]
    assert "base" in ended
    assert len({"a2", "b2"} & set(ended)) == 1, "one adapter is closed, the other is not"


def test_an_abort_while_the_adapter_loads_leaves_nothing():
    residency = FakeResidency(room=1, delay=5)
    engine = fake_engine(residency=residency)
    for name in ("a", "b"):
        engine.register_adapter(name, "")
    engine.submit(job("gone", adapter="a"))
    engine.step()
    assert engine._scheduler._adapters.claimant is not None
    engine.abort("gone")
    assert engine._scheduler._adapters.claimant is None
    assert not engine.has_work
    engine.submit(job("next", adapter="b"))
    assert len(tokens(run(engine)["next"])) == 8


# --- deadlines ----------------------------------------------------------------------------------------------------


def test_deadlines_end_those_who_wait_and_those_who_run():
    now = [100.0]
    runner = FakeRunner(64)
    engine = fake_engine(max_num_seqs=1, runner=runner, clock=lambda: now[0])
    engine.submit(job("runs", num_tokens=50, deadline=110.0))
    engine.submit(job("waits", deadline=105.0))
    engine.submit(job("late", deadline=99.0))
    (late,) = (output for output in engine.step().outputs if output.request_id == "late")
    assert (late.finish_reason, late.error_kind) == ("error", "deadline")
    now[0] = 105.0
    waits = engine.step().outputs[0]
    assert (waits.request_id, waits.error_kind) == ("waits", "deadline")
    assert "waited for its turn" in waits.error
    now[0] = 110.0
    assert engine.stats().kv_blocks_used > 0
    (runs,) = engine.step().outputs
    assert (runs.request_id, runs.error_kind) == ("runs", "deadline")
    assert "ran: " in runs.error
    assert "2 tokens" in runs.error
    assert engine.stats().kv_blocks_used == 0
    assert {name for rows in runner.rows_of_steps for name, _ in rows} == {"runs"}
    assert not engine.has_work


def test_blocks_of_a_late_one_are_free_before_the_step():
    now = [0.0]
    engine = fake_engine(num_blocks=4, clock=lambda: now[0], caching=False)
    engine.submit(job("late", length=12, deadline=5.0))
    engine.step()
    engine.submit(job("next", length=12, num_tokens=1))
    now[0] = 5.0
    assert {output.request_id for output in engine.step().outputs} == {"late", "next"}


def test_deadlines_of_those_who_ended_are_forgotten():
    engine = fake_engine()
    for i in range(300):
        engine.submit(job(f"r{i}", num_tokens=1, deadline=1e12))
        run(engine)
    assert len(engine._deadlines._heap) < 100


@pytest.mark.parametrize("fields", [{"weight": 0.0}, {"weight": float("nan")}, {"deadline": float("nan")}])
def test_weights_and_deadlines_that_are_none_are_refused(fields):
    engine = fake_engine()
    engine.submit(job("a", **fields))
    assert "expected numbers" in run(engine)["a"][0].error


# --- salts --------------------------------------------------------------------------------------------------------


def test_blocks_are_shared_among_equal_salts_only():
    engine = fake_engine()
    prompt = prompt_of(20)
    found = {}
    for name, salt in (("a", ""), ("b", "x"), ("c", "y"), ("d", "x"), ("e", "")):
        engine.submit(Submit(name, prompt, SamplingParams(max_tokens=2, temperature=0.0), cache_salt=salt))
        found[name] = run(engine)[name][0].cached_tokens
    assert found == {"a": 0, "b": 0, "c": 0, "d": 16, "e": 16}


# --- everything at once -------------------------------------------------------------------------------------------

MOVES = st.one_of(
    st.tuples(
        st.just("submit"),
        st.integers(1, 30),  # prompt
        st.integers(1, 12),  # output
        st.sampled_from([None, "v0", "v1", "v2", "bad"]),
        st.sampled_from(["", "t1", "t2"]),
        st.sampled_from([None, 4.0, 30.0]),  # deadline
        st.integers(-1, 1),  # priority
        st.sampled_from(["", "salt"]),
    ),
    st.tuples(st.just("abort"), st.integers(0, 100)),
    st.tuples(st.just("step"), st.integers(1, 6)),
)


@dataclass
class Churn:
    """An engine under random moves, checked after each."""

    num_blocks: int
    room: int
    now: float = 0.0
    jobs: dict[str, Submit] = field(default_factory=dict)
    aborted: set[str] = field(default_factory=set)
    told: dict[str, list[SequenceOutput]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        self.residency = FakeResidency(room=self.room, delay=2, broken={"bad": "its file is gone"})
        self.engine = fake_engine(
            num_blocks=self.num_blocks,
            max_num_seqs=4,
            max_batch_tokens=8,
            residency=self.residency,
            clock=lambda: self.now,
        )
        for name in ("v0", "v1", "v2", "bad"):
            self.engine.register_adapter(name, "")

    def submit(self, length, num_tokens, adapter, tenant, deadline, priority, salt) -> None:
        name = str(len(self.jobs))
        self.jobs[name] = job(
            name,
            length=length,
            num_tokens=num_tokens,
            adapter=adapter,
            tenant=tenant,
            deadline=None if deadline is None else self.now + deadline,
            priority=priority,
            cache_salt=salt,
        )
        self.engine.submit(self.jobs[name])

    def abort(self, number: int) -> None:
        name = str(number)
        if name in self.jobs and not any(output.finish_reason for output in self.told[name]):
            self.aborted.add(name)
        self.engine.abort(name)
        check(self.engine, self.residency)

    def step(self, times: int) -> None:
        for _ in range(times):
            self.now += 1.0
            for output in self.engine.step().outputs:
                self.told[output.request_id].append(output)
            check(self.engine, self.residency)

    def assert_answered(self, name: str) -> None:
        request, answer = self.jobs[name], tokens(self.told[name])
        ends = [output for output in self.told[name] if output.finish_reason]
        assert len(ends) == (name not in self.aborted)
        wanted = expected(request.prompt_token_ids, name_of(request.adaptation), request.sampling.max_tokens)
        assert answer == wanted[: len(answer)]
        if ends and ends[0].finish_reason == "length":
            most = self.num_blocks * 4 - len(request.prompt_token_ids)
            assert len(answer) == min(request.sampling.max_tokens, most)


@settings(max_examples=60, deadline=None)
@given(moves=st.lists(MOVES, max_size=50), num_blocks=st.integers(10, 30), room=st.integers(1, 3))
def test_whatever_happens_everything_ends_once_and_nothing_leaks(moves, num_blocks, room):
    churn = Churn(num_blocks, room)
    for move, *arguments in moves:
        getattr(churn, move)(*arguments)
    for _ in range(3000):
        if not churn.engine.has_work:
            break
        churn.step(1)
    assert not churn.engine.has_work, "somebody starves"
    for name in churn.jobs:
        churn.assert_answered(name)
    assert churn.engine.stats().kv_blocks_used == 0
    assert not any(churn.residency.users.values())
    assert not churn.engine._scheduler._shares._shares
    assert not len(churn.engine._scheduler._shares._tenants)


def check(engine: Engine, residency: FakeResidency) -> None:
    """Blocks and adapters are held by who runs, and by nobody else; a free place is not left to nobody."""
    scheduler, blocks = engine._scheduler, engine._blocks
    held = {block for sequence in scheduler.running for block in sequence.blocks}
    assert len(held) == blocks.num_blocks - blocks.num_free
    users: dict[str, int] = defaultdict(int)
    for sequence in scheduler.running:
        for version in sequence.adaptation.versions:
            users[version] += 1
    assert users == {version: count for version, count in residency.users.items() if count}
    assert len(scheduler.running) + len(scheduler.waiting) == len(engine._sequences)
    waiting = sum(account.num_waiting for account in scheduler._shares._tenants._accounts.values())
    assert waiting == len(scheduler.waiting)


def test_no_place_is_idle_while_somebody_could_run():
    """Base requests beside large ones that do not fit and cold adapters that load."""
    residency = FakeResidency(room=2, delay=4)
    traffic = Traffic(fake_engine(num_blocks=60, max_num_seqs=6, max_batch_tokens=64, residency=residency))
    for i in range(4):
        traffic.engine.register_adapter(f"v{i}", "")
    scheduler = traffic.engine._scheduler
    for step in range(300):
        if step % 3 == 0:
            traffic.submit(job(f"c{step}", adapter=f"v{step % 4}", tenant="cold"), "cold")
        if step % 40 == 0:
            traffic.submit(job(f"l{step}", length=150, tenant="large"), "large")
        traffic.keep_waiting("base", 6, num_tokens=6)
        before = traffic.engine.stats().num_preemptions
        traffic.step()
        rows = traffic.engine._runner.rows_of_steps[-1]
        has_room = len(rows) < 6 and sum(count for _, count in rows) < 64
        unfit = [scheduler._num_steps - each.unfit_since for each in scheduler.waiting if each.unfit_since is not None]
        is_kept = any(each.was_preempted for each in scheduler.waiting) or max(unfit, default=0) >= PATIENCE
        if has_room and not is_kept and before == traffic.engine.stats().num_preemptions:
            found = scheduler._prefixes
            bases = [each for each in scheduler.waiting if not each.adaptation.versions]
            able = [each for each in bases if found.has_room(each, found.cached(each))]
            assert not able or len(unfit) >= MOST_UNFIT
    assert {traffic.owner[name] for name in traffic.ended} == {"base", "cold", "large"}


def test_each_token_is_counted_once_by_what_it_costs():
    shares = Shares()
    sequence = Sequence(job("a", length=8, tenant="t", weight=2.0), arrival=0)
    shares.enter(sequence)
    counted = []
    for start, end in ((0, 5), (5, 8), (8, 10), (0, 6), (6, 11), (4, 4)):  # in chunks; again after a preemption
        shares.count(sequence, start, end)
        counted.append(shares[sequence].service)
    assert counted == [(2.5, 5.0), (4.0, 8.0), (6.0, 12.0), (6.0, 12.0), (7.0, 14.0), (7.0, 14.0)]

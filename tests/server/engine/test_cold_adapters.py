"""Hot adapters keep no cold one out, whatever host memory holds: the real scheduler and residency, counted loads."""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from perseid_server.adapters.residency import Residency
from perseid_server.engine.adaptation import Adaptation
from perseid_server.engine.kv_blocks import BlockAllocator
from perseid_server.engine.messages import Submit
from perseid_server.engine.scheduler import Scheduler, SchedulerLimits
from perseid_server.engine.sequence import Sequence
from perseid_server.model.sampling_params import SamplingParams
from tests.server.adapters.slow_loads import COPY_BYTES, SlowLoader, slow_residency

PLACES = 8
LONGEST = 60  # answer, tokens

Wanted = tuple[str, ...]  # versions of a request; none: the base


@dataclass
class Flood:
    """Hot adapters of which requests always wait, and cold ones of which each is asked once."""

    residency: Residency
    loader: SlowLoader
    hot: tuple[Wanted, ...]
    num_steps: int = 0
    started: dict[Wanted, int] = field(default_factory=dict)  # the step in which one first started
    steps: dict[Wanted, list[int]] = field(default_factory=lambda: defaultdict(list))  # in which one ran
    most_bytes: int = 0  # in host memory, since loads are known

    def __post_init__(self) -> None:
        self._scheduler = Scheduler(SchedulerLimits(64, PLACES), BlockAllocator(4000, 16), self.residency)
        self._random = random.Random(1)
        self._ends: dict[str, int] = {}

    def submit(self, *versions: str, num_tokens: int | None = None, **fields: int) -> Sequence:
        name = f"{len(self._ends)}"
        self._ends[name] = num_tokens or self._random.randint(10, LONGEST)
        adaptation = Adaptation(tuple((version, 1.0) for version in versions))
        request = Submit(name, tuple(range(8)), SamplingParams(max_tokens=999), adaptation, **fields)
        sequence = Sequence(request, len(self._ends))
        self._scheduler.add(sequence)
        return sequence

    def abort(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)

    def step(self) -> None:
        waiting = Counter(sequence.adaptation.versions for sequence in self._scheduler.waiting)
        for versions in self.hot:
            for _ in range(PLACES - waiting[versions]):
                self.submit(*versions)
        self.residency.poll()
        self.num_steps += 1
        for chunk in self._scheduler.schedule().chunks:
            sequence = chunk.sequence
            versions = sequence.adaptation.versions
            self.started.setdefault(versions, self.num_steps)
            self.steps[versions].append(self.num_steps)
            if chunk.samples:
                sequence.append(1)
            self._scheduler.computed(chunk)
            if sequence.num_output >= self._ends[sequence.id]:
                self._scheduler.remove(sequence)
        self.most_bytes = max(self.most_bytes, self.residency._host.nbytes)

    def run(self, num_steps: int, until: Collection[Wanted] = ()) -> bool:
        """Whether all these have started."""
        for _ in range(num_steps):
            self.step()
            if until and all(versions in self.started for versions in until):
                return True
        return False

    def longest_pause(self, versions: Wanted, since: int) -> int:
        steps = [since, *(step for step in self.steps[versions] if step > since), self.num_steps]
        return max(after - before for before, after in pairwise(steps))


@pytest.fixture
def flood(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Flood]:
    """Requests for hot adapters have filled the engine."""

    def build(
        *, hot: tuple[Wanted, ...], others: Collection[str] = (), pages: Mapping[str, int] | None = None, **room: int
    ) -> Flood:
        residency, loader = slow_residency(monkeypatch, pages=pages, **room)
        for version in {*(version for versions in hot for version in versions), *others}:
            residency.register(version, "")
        made = Flood(residency, loader, hot)
        made.run(100)
        loader.reads.clear()
        return made

    return build


@pytest.mark.parametrize("host", [1, 2, 3])
@pytest.mark.parametrize("num_cold", [2, 3, 5, 12])
@pytest.mark.parametrize("ticks", [1, 10, 40])
def test_cold_adapters_start_beside_a_flood_of_a_hot_one(
    flood: Callable[..., Flood], host: int, num_cold: int, ticks: int
) -> None:
    cold = [(f"cold{number}",) for number in range(num_cold)]
    engine = flood(hot=(("hot",), ()), others=[name for (name,) in cold], device=1, host=host, ticks=ticks)
    begun = engine.num_steps
    for (name,) in cold:
        engine.submit(name)
    assert engine.run(num_cold * (LONGEST + 2 * ticks + 10), until=cold)
    assert len(engine.loader.reads) <= num_cold + 3
    assert engine.longest_pause((), since=begun) <= 5, "the base goes on"
    assert engine.most_bytes <= host * COPY_BYTES
    assert engine.run(2 * LONGEST + 3 * ticks + 10, until=[("hot",)])


@pytest.mark.parametrize("host", [1, 2, 3])
@pytest.mark.parametrize("width", [2, 3])
@pytest.mark.parametrize("ticks", [1, 20])
def test_cold_blends_get_all_they_need(flood: Callable[..., Flood], host: int, width: int, ticks: int) -> None:
    hot = (("hot0",), ("hot1",), ("hot2",), ())
    cold = [tuple(f"cold{number}{part}" for part in range(width)) for number in range(4)]
    engine = flood(hot=hot, others=[part for parts in cold for part in parts], device=3, host=host, ticks=ticks)
    begun = engine.num_steps
    for parts in cold:
        engine.submit(*parts)
    assert engine.run(len(cold) * (LONGEST + 2 * width * ticks + 20), until=cold)
    assert len(engine.loader.reads) <= 2 * (len(cold) * width + 3)
    assert engine.longest_pause((), since=begun) <= 2 * LONGEST, "the base waits for its turn at most"
    assert engine.most_bytes <= host * COPY_BYTES


@pytest.mark.parametrize("host", [1, 2, 8])
def test_as_few_as_needed_are_closed_while_cold_ones_load(flood: Callable[..., Flood], host: int) -> None:
    """Four hot adapters, cold ones of one page: one page at a time has to change hands."""
    hot = tuple((f"hot{number}",) for number in range(4))
    cold = [(f"cold{number}",) for number in range(6)]
    engine = flood(hot=hot, others=[name for (name,) in cold], device=4, host=host, ticks=20)
    begun = engine.num_steps
    for (name,) in cold:
        engine.submit(name)
    idle = 0
    while not engine.run(1, until=cold):
        assert engine.num_steps < begun + 6 * (LONGEST + 80)
        closed = set(engine._scheduler._adapters._closed)
        assert len(closed) <= 1
        running = {sequence.adaptation.versions for sequence in engine._scheduler.running}
        idle += not running & set(hot)
    assert idle <= 0.1 * (engine.num_steps - begun), "hot ones go on"


def test_what_is_closed_stays_closed_until_the_claimant_starts(flood: Callable[..., Flood]) -> None:
    """Also while host memory has room for one of what it needs only, and the rest is read."""
    hot = (("hot0",), ("hot1",), ())
    engine = flood(hot=hot, others=["a", "b"], device=2, host=1, ticks=30)
    engine.submit("a", "b")
    assert engine.run(4 * LONGEST + 200, until=[("a", "b")])  # the sizes are known now
    engine.run(2 * LONGEST + 200)
    begun = engine.num_steps
    scheduler, closed = engine._scheduler, set[str]()
    claimant = engine.submit("a", "b")
    while claimant in scheduler.waiting:
        if scheduler._adapters.claimant is claimant:
            assert closed <= set(scheduler._adapters._closed)
            closed = set(scheduler._adapters._closed)
        before = list(scheduler.running)
        engine.step()
        fresh = {each.adaptation.versions for each in scheduler.running if each not in before}
        assert fresh.isdisjoint((version,) for version in closed)
    assert closed == {"hot0", "hot1"}
    assert engine.num_steps - begun < LONGEST + 120


def test_an_adapter_wider_than_host_memory_comes_too(flood: Callable[..., Flood]) -> None:
    pages = {"wide": 3}
    engine = flood(hot=(("hot0",), ("hot1",)), others=["wide", "cold"], pages=pages, device=3, host=1, ticks=10)
    engine.submit("wide")
    engine.submit("cold")
    assert engine.run(4 * LONGEST, until=[("wide",), ("cold",)])
    assert len(engine.loader.reads) <= 8


def test_a_claim_that_is_given_up_leaves_the_hot_one_open(flood: Callable[..., Flood]) -> None:
    engine = flood(hot=(("hot",),), others=["cold"], device=1, host=1, ticks=5)
    cold = engine.submit("cold", num_tokens=5)
    engine.run(12)
    room = engine._scheduler._adapters
    assert room._closed == ["hot"]
    engine.abort(cold)
    assert (room.claimant, room._is_short, room._closed) == (None, False, [])
    begun = engine.num_steps
    engine.run(200)
    assert engine.longest_pause(("hot",), since=begun) <= LONGEST
    assert ("cold",) not in engine.started


def test_who_goes_first_takes_the_claim_and_gives_it_back(flood: Callable[..., Flood]) -> None:
    engine = flood(hot=(("hot",), ()), others=["cold", "urgent"], device=1, host=1, ticks=10)
    engine.submit("cold")
    engine.run(15)
    room = engine._scheduler._adapters
    assert room._closed == ["hot"]
    engine.submit("urgent", priority=-1)
    while room.claimed != ("urgent",):
        engine.step()
    assert room._closed == [], "the hot one goes on until the urgent one is read"
    assert engine.run(3 * LONGEST, until=[("cold",), ("urgent",)])
    assert engine.started["urgent",] < engine.started["cold",]


def test_a_claim_that_is_given_up_leaves_host_memory_to_others(flood: Callable[..., Flood]) -> None:
    """Copies that nobody waits for any more must not keep out those that somebody does."""
    cold = [f"cold{number}" for number in range(6)]
    engine = flood(hot=(("hot",),), others=cold, device=1, host=2, ticks=2)
    for name in cold[:3]:
        engine.submit(name)
    engine.run(8)
    for sequence in list(engine._scheduler.waiting):
        engine.abort(sequence)
    for name in cold[3:]:
        engine.submit(name)
    assert engine.run(3 * (LONGEST + 20), until=[(name,) for name in cold[3:]])
    assert len(engine.loader.reads) <= 10

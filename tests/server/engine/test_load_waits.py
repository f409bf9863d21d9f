"""How long a sequence waited for what was not on the device."""

from perseid_server.engine.load_waits import MOST_WAITS, LoadWaits
from tests.fakes import FakeResidency, fake_engine
from tests.server.engine.test_engine import prompt_of, request


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def at(self, now: float) -> None:
        self.now = now


def waits(*events: tuple[float, str, str]) -> LoadWaits:
    """(when, what happens, version)."""
    clock = Clock()
    found = LoadWaits(clock)
    for now, what, version in events:
        clock.at(now)
        getattr(found, what)(version)
    return found


def test_what_was_there_is_not_waited_for():
    assert waits().waited_s(("a",), 0.0) == 0.0
    assert waits((1, "came", "a")).waited_s(("a",), 0.0) == 0.0
    assert waits((1, "missed", "a")).waited_s(("b",), 0.0) == 0.0


def test_from_the_first_miss_to_its_coming():
    found = waits((1, "missed", "a"), (3, "missed", "a"), (5, "came", "a"), (6, "came", "a"))
    assert found.waited_s(("a",), 0.5) == 4.0
    assert found.waited_s(("a",), 2.0) == 3.0  # it arrived when others waited already
    assert found.waited_s(("a",), 5.5) == 0.0  # after the load


def test_a_second_load_is_another():
    found = waits((1, "missed", "a"), (2, "came", "a"), (7, "missed", "a"), (9, "came", "a"))
    assert found.waited_s(("a",), 0.0) == 2.0


def test_several_are_waited_for_together():
    found = waits((1, "missed", "a"), (2, "missed", "b"), (4, "came", "a"), (6, "came", "b"))
    assert found.waited_s(("a", "b", "c"), 0.0) == 5.0


def test_only_the_latest_are_remembered():
    found = waits(*((i, "missed", str(i)) for i in range(MOST_WAITS + 1)), (9999, "came", "0"), (9999, "came", "1"))
    assert found.waited_s(("0",), 0.0) == 0.0
    assert found.waited_s(("1",), 0.0) == 9998.0


def test_the_engine_tells_it_with_the_first_output():
    engine = fake_engine(residency=FakeResidency(delay=3), max_num_seqs=2)
    engine.register_adapter("cold", "")
    for name, adapter in (("base", None), ("cold", "cold"), ("again", "cold")):
        engine.submit(request(name, prompt_of(4), 20, adapter=adapter))
    first = {}
    while engine.has_work:
        for output in engine.step().outputs:
            first.setdefault(output.request_id, output)
    assert first["base"].load_s == 0.0
    assert 0 < first["cold"].load_s <= first["cold"].queue_s
    assert 0 < first["again"].load_s < first["again"].queue_s  # then it waited for a place
    engine.submit(request("warm", prompt_of(4), 2, adapter="cold"))
    (warm,) = engine.step().outputs
    assert warm.load_s == 0.0

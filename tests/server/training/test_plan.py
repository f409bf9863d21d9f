"""The samples of a step are a function of its number: fair, shuffled, and the same after a restart."""

from collections import Counter

from perseid_server.training.plan import Group, Plan
from perseid_server.training.samples import Sample


def samples(source: str, count: int) -> tuple[Sample, ...]:
    return tuple(Sample((number, 0), (0, 0), (True, True), (False, False), source) for number in range(count))


PLAN = Plan((Group(samples("a", 10), 2), Group(samples("b", 3), 2), Group(samples("c", 1), 1)), seed=5)


def test_every_step_has_its_share_of_every_group() -> None:
    for step in range(9):
        assert [sample.source for sample in PLAN.samples(step)] == ["a", "a", "b", "b", "c"]


def test_every_sample_is_seen_once_a_round() -> None:
    for source, steps, rounds in (("a", 5, 1), ("a", 15, 3), ("b", 3, 2)):
        seen = Counter(
            sample.token_ids[0] for step in range(steps) for sample in PLAN.samples(step) if sample.source == source
        )
        assert set(seen.values()) == {rounds}, source


def test_the_order_follows_the_seed_and_changes_each_round() -> None:
    def order(plan: Plan, steps: range) -> list[int]:
        return [sample.token_ids[0] for step in steps for sample in plan.samples(step)[:2]]

    assert order(PLAN, range(5)) == order(Plan(PLAN.groups, seed=5), range(5))
    assert order(PLAN, range(5)) != order(PLAN, range(5, 10))
    assert order(PLAN, range(5)) != order(Plan(PLAN.groups, seed=6), range(5))
    assert PLAN.groups[1].steps_per_epoch == 2

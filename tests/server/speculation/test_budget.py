"""The draft budget: against every count, and heads that rest when they do not pay."""

import random

from perseid_server.speculation.budget import (
    FIRST_REST,
    LULL_AFTER,
    MARGIN,
    SELDOM,
    TRIAL,
    Habit,
    Habits,
    Lull,
    best_count,
    least_worthwhile,
)
from perseid_server.speculation.step_clock import StepClock

CPU = StepClock({1: 2.4, 2: 2.6, 3: 3.3, 4: 3.9, 6: 5.0, 8: 6.2, 16: 12.5, 32: 24.0})
FLAT = StepClock({1: 10.0, 64: 10.0})


def rate(num_sequences: int, values: list[float], count: int) -> float:
    return (num_sequences + sum(values[:count])) / CPU.seconds(num_sequences + count, trees=count > 0)


def test_takes_what_makes_most_tokens_a_second() -> None:
    source = random.Random(5)
    for _ in range(300):
        num_sequences = source.randrange(1, 17)
        values = sorted((source.random() for _ in range(source.randrange(1, 20))), reverse=True)
        count = best_count(CPU, num_sequences, values)
        best = max(rate(num_sequences, values, other) for other in range(len(values) + 1))
        if count:
            assert rate(num_sequences, values, count) == best
        else:
            assert best <= MARGIN * rate(num_sequences, values, 0) + 1e-9, "no more than the margin is given away"


def test_unlikely_drafts_get_no_row() -> None:
    assert best_count(CPU, 1, [0.05, 0.01]) == 0
    assert best_count(CPU, 16, [0.5] * 16) == 0


def test_a_second_row_is_all_but_free_here() -> None:
    assert best_count(CPU, 1, [0.3, 0.05]) == 1


def test_where_rows_are_free_all_are_taken() -> None:
    assert best_count(FLAT, 4, [0.5, 0.2, 0.05, 0.05, 0.05]) == 5


def test_the_least_worthwhile_value_shuts_out_nothing_that_pays() -> None:
    for num_sequences in (1, 2, 4, 8, 16):
        least = least_worthwhile(CPU, num_sequences, num_sequences)
        assert best_count(CPU, num_sequences, [0.95 * least] * 32) == 0
    assert least_worthwhile(FLAT, 4, 4) == 0.0


def test_beside_a_prefill_a_draft_is_worth_what_it_is_without() -> None:
    """The prompt has to be read whatever is drafted."""
    assert best_count(CPU, 16, [0.5] * 8, num_rows=200) == 0
    assert best_count(CPU, 1, [0.9, 0.8], num_rows=20) == 2
    assert best_count(CPU, 1, [0.2, 0.1], num_rows=20) == 0, "a row more is not free in a wide step"


def steps_asked(habit: Habit, saved: float, steps: int) -> int:
    asked = 0
    for _ in range(steps):
        if habit.asks():
            asked += 1
            habit.saw(saved)
    return asked


def test_heads_that_pay_are_always_asked() -> None:
    assert steps_asked(Habit(), 0.4, 1000) == 1000


def test_heads_that_do_not_pay_rest_longer_each_time() -> None:
    habit = Habit()
    asked = [steps_asked(habit, -0.1, 1000) for _ in range(10)]
    assert asked[0] < 150
    assert max(asked[1:]) <= 3 * (TRIAL + 2), "tried again, seldom"
    assert sum(asked[1:]) >= TRIAL, "but tried again"


def test_heads_that_begin_to_pay_are_asked_again() -> None:
    habit = Habit()
    steps_asked(habit, -0.1, 100)
    steps_asked(habit, 0.5, 4 * FIRST_REST)
    assert steps_asked(habit, 0.5, 200) == 200


def test_a_slow_first_call_is_not_held_against_heads() -> None:
    """Threads start, memory is touched: what follows is what asking costs."""
    habits = Habits()
    habits.asking(1, 1.0)
    for _ in range(30):
        usual = habits.asking(1, 0.1)
    assert usual < 0.11
    assert habits.asking(1, 5.0) < 0.3, "nor is an outlier later"


def asked_until_rest(habits: Habits, adapter: str, saved: float, num_sequences: int = 1) -> int:
    asked = 0
    while habits.asks(adapter, num_sequences):
        habits.saw(adapter, num_sequences, saved)
        asked += 1
    return asked


def test_habits_are_those_of_an_adapter_and_a_size_of_batch() -> None:
    habits = Habits()
    assert asked_until_rest(habits, "a", -0.2, 3) > 5
    assert not habits.asks("a", 4), "as three at once"
    assert habits.asks("a", 5)
    assert habits.asks("b", 3)
    habits.forget("a")
    assert habits.asks("a", 3)


def test_a_new_adapter_begins_with_what_others_saved() -> None:
    """Where heads pay for nobody, thousands of adapters are not tried for long each."""
    habits = Habits()
    first = asked_until_rest(habits, "first", -0.2)
    others = [asked_until_rest(habits, str(place), -0.2) for place in range(100)]
    assert sum(others) / len(others) < 3 < first


def test_one_slow_step_does_not_turn_heads_off() -> None:
    habit = Habit()
    for _ in range(50):
        habit.saw(0.3)
    habit.saw(-1000.0)
    assert habit.asks()


def looks(lull: Lull, steps: int, least_value: float, *, found: bool = False) -> int:
    count = 0
    for _ in range(steps):
        if not lull.skips(least_value):
            count += 1
            lull.saw(found=found)
    return count


def test_where_little_pays_and_nothing_is_found_drafts_are_looked_for_seldom() -> None:
    lull = Lull()
    assert looks(lull, LULL_AFTER, 0.8) == LULL_AFTER
    assert looks(lull, 10 * SELDOM, 0.8) == 10
    assert looks(lull, 10, 0.2) == 10, "where much pays they always are"
    looks(lull, SELDOM, 0.8, found=True)
    assert looks(lull, LULL_AFTER, 0.8) == LULL_AFTER, "one that was found ends the lull"


def tried(habits: Habits, adapter: str, saved: float, limit: int = 200) -> int:
    """Steps until its heads rest."""
    for steps in range(limit):
        if not habits.asks(adapter, 16):
            return steps
        habits.saw(adapter, 16, saved)
    return limit


def test_heads_of_many_adapters_are_tried_together() -> None:
    """Eight adapters in one batch do not take eight times as long to learn that drafts do not pay there."""
    alone = tried(Habits(), "a", -0.1)
    habits, steps = Habits(), 0
    while asking := [name for name in "abcdefgh" if habits.asks(name, 16)]:
        for name in asking:
            habits.saw(name, 16, -0.1)
        steps += 1
    assert steps < alone / 2
    assert tried(Habits(), "a", 0.5) == 200, "those that pay never rest"

"""The prompt families: fixed, disjoint, checkable, and asked differently."""

import pytest
from families import FAMILIES
from families.base import TRAIN_ITEMS, family
from tasks import TASKS
from tasks.base import DEV_ITEMS, HELD_OUT_ITEMS

NEW = [name for name in FAMILIES if name not in TASKS]


@pytest.fixture(params=NEW)
def task(request):
    return FAMILIES[request.param]


def every_item(task):
    splits = task.splits
    return splits.train + splits.dev + splits.held_out


def test_sixty_four_with_the_example_tasks_first():
    assert list(FAMILIES)[: len(TASKS)] == list(TASKS)
    assert len(FAMILIES) == 64


def test_building_twice_gives_equal_items(task):
    assert task.build() == task.build()


def test_splits_have_their_sizes_and_share_no_question(task):
    splits = task.splits
    assert [len(part) for part in (splits.train, splits.dev, splits.held_out)] == [
        TRAIN_ITEMS,
        DEV_ITEMS,
        HELD_OUT_ITEMS,
    ]
    questions = [item.question for item in every_item(task)]
    assert len(set(questions)) == len(questions)


def test_no_question_belongs_to_two_families():
    questions = [item.question for task in FAMILIES.values() for item in every_item(task)]
    assert len(set(questions)) == len(questions)


def test_checker_accepts_its_own_answers_only(task):
    for item in every_item(task):
        assert item.answer
        assert task.check(f" {item.answer}\n", item)
        assert not task.check("", item)
        assert not task.check(f"The answer is {item.answer}.", item)


def test_answers_are_one_short_line(task):
    assert all("\n" not in item.answer and len(item.answer) <= 80 for item in every_item(task))


def test_every_other_held_out_item_is_asked_in_an_unseen_way():
    task = family("t", "", ("one {}", "two {}", "three {}"), lambda rng: (str(rng.randrange(1000)), "x"))
    ways = [item.question.split()[0] for item in task.splits.held_out]
    assert ways[1::2] == ["three"] * (HELD_OUT_ITEMS // 2)
    assert set(ways[::2]) | {item.question.split()[0] for item in task.splits.train} == {"one", "two"}


def test_too_few_subjects_are_refused():
    with pytest.raises(ValueError, match="t: 10 different subjects"):
        _ = family("t", "", ("{}", "{}?"), lambda rng: (str(rng.randrange(10)), "x")).splits


@pytest.mark.parametrize(
    ("name", "question", "answer"),
    [
        ("morse", "Telegraph term in Morse.", "- . .-. --"),
        ("radio-alphabet", "Radio spelling of region, over.", "Romeo Echo Golf India Oscar November"),
        ("caesar", "Caesar cipher, shift 3: inside", "lqvlgh"),
        ("pig-latin", "tell in pig Latin, please.", "elltay"),
        ("weekday", "Weekday of 2023-04-24", "Monday"),
        ("leap-year", "Leap year: 1808?", "yes"),
        ("twelve-hours", "23:07 on the twelve-hour clock", "11:07 p.m."),
        ("next-prime", "Next prime after 194", "197"),
        ("miles", "73.3 km in miles", "45.5 mi"),
        ("base64", "base64 -w0 <<< voice", "dm9pY2U="),
        ("ordinal", "Ordinal: 490", "490th"),
        ("json-array", "JSON array out of war, tax, nature", '["war", "tax", "nature"]'),
    ],
)
def test_spot_truths(name, question, answer):
    [found] = {item.answer for item in every_item(FAMILIES[name]) if item.question == question}
    assert found == answer

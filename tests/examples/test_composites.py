"""Composite prompts: balanced and disjoint, scored by the tasks' checkers, labelled as they are served."""

from collections import Counter

import pytest
from composites import END, LOGIT_BIAS, PLACEHOLDER, SIZES, START, answers, composites, training_composites
from tasks import TASKS

from perseid_server.frontend.requests import ChatInput
from perseid_server.frontend.text import TextProcessor
from perseid_server.model.source import resolve_model
from perseid_server.model.tokenizer import export_tokenizer

VOCABULARY = 49_152


@pytest.fixture(scope="module")
def text():
    return TextProcessor(export_tokenizer(resolve_model("embedded")), VOCABULARY)


def ids(text, piece):
    return text.tokenizer.encode(piece, add_special_tokens=False).ids


def held_out(size, count=16):
    return composites("held_out", size, count, seed=1)


@pytest.mark.parametrize("size", SIZES)
def test_problems_are_of_different_tasks_and_every_task_comes_equally_often(size):
    found = held_out(size)
    assert all(len({problem.task for problem in one.problems}) == size for one in found)
    counts = Counter(problem.task for one in found for problem in one.problems)
    assert counts == dict.fromkeys(TASKS, 2 * size)


def test_building_twice_gives_equal_composites_and_other_seeds_give_others():
    assert held_out(3) == held_out(3)
    assert held_out(3) != composites("held_out", 3, 16, seed=2)


def test_a_composite_of_more_problems_than_tasks_is_refused():
    with pytest.raises(ValueError, match="expected 1 to 8"):
        composites("held_out", 9, 1, seed=1)


def test_evaluation_and_training_take_their_own_items():
    asked = [problem for size in SIZES for one in held_out(size) for problem in one.problems]
    taught = [problem for one in training_composites(64, seed=1) for problem in one.problems]
    assert all(problem.item in TASKS[problem.task].splits.held_out for problem in asked)
    assert all(problem.item in TASKS[problem.task].splits.train for problem in taught)


def test_training_has_every_size_equally_often():
    assert Counter(len(one.problems) for one in training_composites(64, seed=1)) == {2: 16, 3: 16, 4: 16, 5: 16}


@pytest.mark.parametrize("size", SIZES)
def test_the_true_completion_solves_everything_and_fits(size, text):
    for one in held_out(size):
        assert one.solved(one.completion()) == [True] * size
        assert len(ids(text, one.completion())) < one.body("auto")["max_tokens"]


def turn(question, answer):
    return f"\n{START}user\n{question}{END}\n{START}assistant\n{answer}{END}"


def test_answers_count_only_for_the_question_they_follow():
    one = held_out(3)[0]
    first, second, third = (problem.item for problem in one.problems)
    assert one.solved(first.answer) == [True, False, False]
    assert one.solved("") == [False] * 3
    assert one.solved(one.completion().replace(first.answer, "wrong", 1)) == [False, True, True]
    assert one.solved("".join(turn(item.question, item.answer) for item in (third, second))) == [False, True, True]
    assert one.solved(turn(second.question, third.answer) + turn(third.question, second.answer)) == [False] * 3


def test_answers_of_an_unfinished_or_wandering_completion():
    asked = ["Q1", "Q2", "Q3"]
    assert answers("A", asked) == ["A", "", ""]
    assert answers(f"A{END}\n{START}user\nQ2{END}\n{START}assistant\nB", asked) == ["A", "B", ""]
    assert answers(f"A{END}\n{START}user\nQ2{END}\n{START}user\nQ3", asked) == ["A", "", ""]
    assert answers(f"A{END}\n{START}assistant\nagain{END}", asked) == ["A", "", ""]
    assert answers(f"A{END}{turn('Q2', 'B')}{turn('Q2', 'late')}{turn('Q1', 'late')}", asked) == ["A", "B", ""]


def test_segments_are_the_prompt_and_the_true_completion(text):
    for size in SIZES:
        for one in held_out(size):
            prompt = text.render(ChatInput(tuple(one.messages())))
            assert "".join(piece["text"] for piece in one.segments()) == prompt + one.completion()


def test_segments_have_the_tokens_that_serving_sees(text):
    for one in (*training_composites(32, seed=3), *held_out(5)):
        served = ids(text, text.render(ChatInput(tuple(one.messages()))) + one.completion())
        assert [token for piece in one.segments() for token in ids(text, piece["text"])] == served


def test_an_adapter_is_right_on_its_question_and_answer_only():
    one = held_out(2)[0]
    labelled = [(piece["adapter"], piece["text"]) for piece in one.segments() if piece["adapter"] is not None]
    assert labelled == [
        pair
        for problem in one.problems
        for pair in ((problem.task, problem.item.question), (problem.task, f"assistant\n{problem.item.answer}"))
    ]
    assert [piece["train"] for piece in one.segments()] == [False] + [True] * 11


def test_the_request_favours_no_model():
    bodies = [held_out(3)[0].body(model) for model in ("auto", "iso-date")]
    assert [body.pop("model") for body in bodies] == ["auto", "iso-date"]
    assert bodies[0] == bodies[1]


def test_the_biased_tokens_are_those_meant(text):
    assert [text.token_text(int(token)) for token in LOGIT_BIAS] == [START, PLACEHOLDER]

"""Chat prompts that heads are trained on: varied, reproducible, and apart from those that judge."""

import json

from chat import Conversation, chat_prompts, generic_prompts
from chat.questions import LONGEST, own_questions

from perseid_server.training.workbench import open_workbench

COUNT = 1500


def test_prompts_are_different_and_the_same_each_time():
    found = chat_prompts(COUNT, seed=1)
    assert len(found) == COUNT == len({one.turns[0] for one in found})
    assert found == chat_prompts(COUNT, seed=1) != chat_prompts(COUNT, seed=2)


def test_no_prompt_is_one_of_those_kept_to_judge_by():
    kept = set(generic_prompts("generic_held_out"))
    assert len(kept) == 100
    assert not kept & {turn for one in chat_prompts(4000, seed=7) for turn in one.turns}


def test_the_prompts_that_come_with_perseid_are_among_them():
    assert set(generic_prompts("generic")) <= {one.turns[0] for one in chat_prompts(COUNT, seed=1)}


def test_some_conversations_have_a_second_turn_after_the_models_own_answer():
    found = chat_prompts(COUNT, seed=1)
    assert 0.1 < sum(len(one.turns) == 2 for one in found) / COUNT < 0.25
    line = json.loads(Conversation(("one", "two")).line("upper"))
    roles = [(message["role"], message["content"]) for message in line["messages"]]
    assert roles == [("user", "one"), ("assistant", None), ("user", "two")]
    assert line["adapter"] == "upper"


def test_nothing_of_a_phrasing_is_left_unfilled():
    assert not [one for one in chat_prompts(4000, seed=3) for turn in one.turns if "{" in turn or "}" in turn]


def test_the_base_asks_questions_of_its_own():
    bench = open_workbench("embedded", {}, max_rows=1024, max_tokens=256)
    told = []
    found = own_questions(bench, 6, 1, lambda done, count: told.append((done, count)))
    assert told == [(done, 6) for done in range(1, 7)]
    assert 1 <= len(found) <= 6
    assert all(len(bench.text.tokenizer.encode(one.turns[0]).ids) <= LONGEST for one in found)
    assert found == own_questions(bench, 6, 1)

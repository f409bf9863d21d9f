"""The cache of answers: what was added is there again, in whatever order it is asked for."""

import pytest
import torch

from perseid_server.errors import InvalidRequest
from perseid_server.training.completions import Answer
from perseid_server.training.medusa.cache import SHARD_ANSWERS, AnswerCache, key_of
from perseid_server.training.medusa.distill import Answered
from perseid_server.training.medusa.positions import NOT_DRAFTED, PAST_END, draft_vocabulary, positions_of

HIDDEN = 4


def answer(number):
    tokens = tuple(range(number, number + 2 + number % 3))
    return Answer(tokens, torch.full((len(tokens), HIDDEN), float(number)).half() + torch.arange(HIDDEN).half())


def filled(folder, count):
    cache = AnswerCache.open(folder)
    for number in range(count):
        cache.add(f"key {number}", answer(number))
    return cache


def test_answers_are_there_again_in_any_order(tmp_path):
    filled(tmp_path, SHARD_ANSWERS + 3).flush()
    again = AnswerCache.open(tmp_path)
    wanted = [SHARD_ANSWERS + 2, 0, 5]
    assert [again.tokens(f"key {number}") for number in wanted] == [answer(number).token_ids for number in wanted]
    expected = torch.cat([answer(number).hidden_NE for number in wanted])
    assert torch.equal(again.hidden([f"key {number}" for number in wanted]), expected)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_killed_run_keeps_its_full_shards(tmp_path):
    filled(tmp_path, SHARD_ANSWERS + 3)  # and is never flushed
    again = AnswerCache.open(tmp_path)
    assert f"key {SHARD_ANSWERS - 1}" in again
    assert f"key {SHARD_ANSWERS}" not in again
    again.add("later", answer(1))
    again.flush()
    assert len(list(tmp_path.iterdir())) == 2  # beside the first, not in its place


def test_a_damaged_shard_is_named(tmp_path):
    filled(tmp_path, 2).flush()
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InvalidRequest, match=r"answers-00000.safetensors cannot be read.*remove it"):
        AnswerCache.open(tmp_path)


def test_a_key_is_of_all_that_decides_an_answer():
    greedy = ("base", None, (1, 2), 8, 0.0, 3)
    changed = [("other", *greedy[1:]), ("base", "adapter", *greedy[2:]), (*greedy[:2], (1,), *greedy[3:])]
    changed += [(*greedy[:3], 9, 0.0, 3), (*greedy[:4], 0.5, 3), (*greedy[:4], 0.5, 4)]
    assert len({key_of(*one) for one in (greedy, *changed)}) == 7
    assert key_of(*greedy) == key_of(*greedy[:5], 4)  # nothing is drawn for a greedy answer


def test_the_draft_vocabulary_has_the_frequent_tokens_and_is_filled_from_the_lowest():
    answers = [(9, 9, 7), (9, 7, 5), (8,)]
    assert draft_vocabulary(answers, 2, 12) == (7, 9)
    assert draft_vocabulary(answers, 7, 12) == (0, 1, 2, 5, 7, 8, 9)
    assert draft_vocabulary(answers, 0, 12) is None
    assert draft_vocabulary(answers, 12, 12) is None


def test_positions_are_states_with_the_tokens_after_the_next_one(tmp_path):
    cache = AnswerCache.open(tmp_path)
    for key, tokens in (("a", (5, 6, 7, 8)), ("b", (6, 5))):
        cache.add(key, Answer(tokens, torch.tensor(tokens)[:, None].expand(-1, HIDDEN).half()))
    cache.flush()
    answers = [Answered("b", 0, "base", (6, 5)), Answered("a", 1, "upper", (5, 6, 7, 8))]
    found = positions_of(cache, answers, 2, (5, 6, 8), 12)
    assert found.hidden_ME[:, 0].tolist() == [6, 5, 6, 7]
    assert found.targets_MH.tolist() == [[0, PAST_END], [1, NOT_DRAFTED], [NOT_DRAFTED, 2], [2, PAST_END]]
    assert found.of_source("upper").tolist() == [1, 2, 3]
    assert found.of_source("base").tolist() == [0]


def test_an_answer_of_one_token_teaches_nothing(tmp_path):
    cache = AnswerCache.open(tmp_path)
    cache.add("end", Answer((3,), torch.ones((1, HIDDEN)).half()))
    cache.flush()
    found = positions_of(cache, [Answered("end", 0, "base", (3,))], 2, None, 12)
    assert (len(found), found.targets_MH.shape) == (0, (0, 2))

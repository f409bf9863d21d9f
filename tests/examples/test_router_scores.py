"""How ways of asking are scored, on replies made up here."""

from dataclasses import dataclass

import pytest
from router_scores import (
    AUTO,
    BASE,
    EXPLICIT,
    UNIFORM,
    composite_ways,
    score_composites,
    score_outside,
    score_task,
    task_ways,
    uniform,
)
from serving import Reply
from tasks import TASKS

ISO_DATE = TASKS["iso-date"]
ADAPTERS = list(TASKS)


class Scripted:
    """A server that has its replies from the test, in turn, and keeps what it was asked."""

    base = "the-base"

    def __init__(self, *replies):
        self.replies = replies
        self.asked = self.sent = None

    def ask(self, questions, max_tokens, model=None, extra=None):
        self.asked = (list(questions), max_tokens, model, extra)
        return self.send(questions)

    def send(self, bodies):
        self.sent = list(bodies)
        return [self.replies[i % len(self.replies)] for i in range(len(self.sent))]


def told(tier, adapter=None, **completion):
    return {
        "adapter": {"name": adapter} if adapter else None,
        "auto": {"tier": tier},
        "routing": {"prompt": {"the-base": 0.25, "iso-date": 0.75}, "completion": completion},
    }


def test_a_task_is_scored_with_its_checker_and_shares():
    truth = ISO_DATE.splits.held_out[0].answer
    server = Scripted(
        Reply(truth, told("request", "iso-date", **{"iso-date": 1.0})),
        Reply("no idea", told("token", **{"the-base": 0.5, "iso-date": 0.5})),
    )
    score = score_task(server, ISO_DATE, AUTO, 2)
    assert (score.right, score.whole_request, score.own_share) == (50, 50, 75)
    assert server.asked[1:] == (ISO_DATE.max_new_tokens, AUTO.model, AUTO.extra)


def test_without_auto_there_is_nothing_to_tell_of_routing():
    score = score_task(Scripted(Reply("no idea")), ISO_DATE, BASE, 3)
    assert (score.right, score.whole_request, score.own_share) == (0, None, None)


def test_every_way_is_asked_for_as_meant():
    ways = {way.name: way for way in task_ways("iso-date", ADAPTERS)}
    assert ways["base"].model is None
    assert ways[EXPLICIT].model == "iso-date"
    options = {name: way.extra["auto"] for name, way in ways.items() if way.model == "auto"}
    assert options == {
        "auto, k = 1": {"k": 1, "tier": "auto"},
        "auto": {"k": 2, "tier": "auto"},
        "gates only, k = 1": {"k": 1, "tier": "token"},
        "gates only": {"k": 2, "tier": "token"},
        "whole requests only": {"tier": "request"},
    }
    assert all(way.extra["routing"] == "summary" for way in ways.values() if way.model == "auto")


def test_a_uniform_mix_weighs_all_the_same():
    way = uniform(ADAPTERS)
    assert way.model is None
    assert [each["name"] for each in way.extra["adapters"]] == ADAPTERS
    assert sum(each["weight"] for each in way.extra["adapters"]) == pytest.approx(1)


def test_composites_are_tried_with_every_single_adapter():
    names = [way.name for way in composite_ways(ADAPTERS)]
    assert names == ["base", "auto", "gates only", UNIFORM, *ADAPTERS]


@dataclass
class Letters:
    """Solved where the answer has each letter."""

    letters: str

    def body(self, model):
        return {"model": model, "messages": self.letters, "max_tokens": 9}

    def solved(self, text):
        return [letter in text for letter in self.letters]


def test_composites_count_problems_and_whole_prompts():
    server = Scripted(Reply("abcd"), Reply("a"))
    score = score_composites(server, 2, [Letters("ab"), Letters("ac")], BASE)
    assert (score.problems, score.prompts, score.whole_request) == (75, 50, None)


def test_composites_are_sent_as_they_are_with_the_way_s_fields():
    server = Scripted(Reply(""))
    score_composites(server, 2, [Letters("ab")], AUTO)
    assert server.sent == [{"model": "auto", "messages": "ab", "max_tokens": 9, **AUTO.extra}]
    score_composites(server, 2, [Letters("ab")], uniform(ADAPTERS))
    assert server.sent[0]["model"] == "the-base"


def test_outside_all_tasks_the_base_is_right():
    server = Scripted(
        Reply("yes", told("request", **{"the-base": 1.0})),
        Reply("no", told("token", **{"the-base": 0.5, "iso-date": 0.5})),
        Reply("perhaps", told("request", "iso-date", **{"iso-date": 1.0})),
        Reply("never", told("token", **{"the-base": 0.5, "iso-date": 0.5})),
    )
    score = score_outside(server, ["1", "2", "3", "4"], ["yes", "no", "maybe", "ever"], AUTO)
    assert (score.same, score.null_prompt, score.null_answer) == (50, 25, 50)
    assert (score.whole_request, score.to_base) == (50, 25)

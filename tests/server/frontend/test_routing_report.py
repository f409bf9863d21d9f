"""Shares by name: of the prompt, of the answer, and of each token."""

import pytest

from perseid_server.engine.adaptation import BASE_COLUMN
from perseid_server.engine.messages import RoutingReport, SequenceOutput
from perseid_server.frontend.routing_report import RoutingTally

COLUMNS = ["a", None, "b", "c", "d", BASE_COLUMN]


def output(*tokens: tuple[float, ...], prompt: tuple[float, ...] | None = None) -> SequenceOutput:
    return SequenceOutput("r", tuple(range(len(tokens))), routing=RoutingReport(prompt, tokens))


def test_a_token_has_its_top_adapters_largest_first_and_no_zeros() -> None:
    tally = RoutingTally(COLUMNS, "tiny")
    [first, second] = tally.saw(output((0.1, 0.0, 0.2, 0.3, 0.05, 0.35), (0.0, 0.0, 0.5, 0.0, 0.0, 0.5)))
    assert first == (("tiny", 0.35), ("c", 0.3), ("b", 0.2), ("a", 0.1))
    assert second == (("b", 0.5), ("tiny", 0.5)), "equal shares by name"


def test_the_answers_shares_are_means_of_its_tokens_beyond_the_top_ones() -> None:
    tally = RoutingTally(COLUMNS, "tiny")
    tally.saw(output((0.125, 0.0, 0.25, 0.25, 0.125, 0.25), prompt=(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)))
    tally.saw(output((0.125, 0.0, 0.75, 0.0, 0.125, 0.0)))
    assert tally.prompt == (("a", 1.0),)
    assert tally.completion == (("b", 0.5), ("a", 0.125), ("c", 0.125), ("d", 0.125), ("tiny", 0.125))


def test_the_prompts_shares_stay_when_later_outputs_tell_none() -> None:
    tally = RoutingTally(["a", BASE_COLUMN], "tiny")
    tally.saw(output((1.0, 0.0), prompt=(0.25, 0.75)))
    tally.saw(output((1.0, 0.0)))
    assert tally.prompt == (("tiny", 0.75), ("a", 0.25))


@pytest.mark.parametrize(("column", "name"), [("a", "a"), (BASE_COLUMN, "tiny")])
def test_a_choice_for_the_whole_request_has_all_of_every_token(column: str, name: str) -> None:
    tally = RoutingTally([column], "tiny", once=True)
    assert tally.saw(SequenceOutput("r", (1, 2))) == ((((name, 1.0),),) * 2)
    assert tally.saw(SequenceOutput("r")) == ()
    assert tally.prompt == tally.completion == ((name, 1.0),)


def test_an_answer_without_tokens_has_no_shares() -> None:
    assert RoutingTally(COLUMNS, "tiny").completion == ()

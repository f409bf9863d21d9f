"""The ranges of a request's fields: the edges are in, what lies beyond is refused by name."""

import math
from typing import Any

import pytest

from perseid_server.errors import InvalidRequest
from perseid_server.frontend.requests import SamplingOptions, check_request_id, check_sampling

VOCAB = 100
EDGES: list[tuple[str, list[Any], list[Any]]] = [
    ("temperature", [0.0, 2.0], [-0.1, 2.1, math.nan, math.inf, -math.inf]),
    ("top_p", [1e-6, 1.0], [0.0, 1.1, -1.0, math.nan]),
    ("min_p", [0.0, 1.0], [-0.1, 1.1, math.nan]),
    ("repetition_penalty", [0.1, 2.0], [0.0, 2.1, math.nan]),
    ("presence_penalty", [-2.0, 2.0], [-2.1, 2.1, math.nan]),
    ("frequency_penalty", [-2.0, 2.0], [-2.1, 2.1, math.inf]),
    ("top_k", [-1, 0, VOCAB], [-2, -5, VOCAB + 1, 10**30]),
    ("n", [1, 128], [0, -1, 129, 10_000]),
    ("seed", [0, -(2**63), 2**64 - 1], [-(2**63) - 1, 2**64, 10**30]),
    ("logprobs", [0, 20], [-1, 21]),
    ("max_tokens", [1, 2**31], [0, -1, 2**31 + 1]),
    ("min_tokens", [0], [-1, 2**31 + 1]),
    ("stop", [("x",) * 16, ("x" * 1024,)], [("x",) * 17, ("",), ("x" * 1025,)]),
    ("stop_token_ids", [(0, VOCAB - 1)], [(VOCAB,), (-1,)]),
    ("logit_bias", [{0: 100.0, 1: -100.0}], [{VOCAB: 0.0}, {-1: 0.0}, {0: 100.1}, {0: math.nan}]),
]


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, good, _ in EDGES for value in good])
def test_values_up_to_the_edge_are_taken(field: str, value: Any) -> None:
    check_sampling(SamplingOptions(**{field: value}), VOCAB)


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, _, bad in EDGES for value in bad])
def test_values_beyond_the_edge_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_sampling(SamplingOptions(**{field: value}), VOCAB)
    assert refused.value.field == field
    assert refused.value.message.startswith(field)


def test_no_tokens_at_all_may_be_asked_for_with_the_echo_of_a_prompt() -> None:
    check_sampling(SamplingOptions(max_tokens=0, echo=True), VOCAB)


def test_more_tokens_at_least_than_at_most_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="min_tokens is 3; expected an integer from 0 to 2"):
        check_sampling(SamplingOptions(max_tokens=2, min_tokens=3), VOCAB)


def test_several_greedy_answers_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="n: greedy answers"):
        check_sampling(SamplingOptions(n=2, temperature=0.0), VOCAB)


@pytest.mark.parametrize("bad", ["", "a" * 129, "a\nb", "é", "\x00"])
def test_request_ids_that_do_not_fit_a_header_are_refused(bad: str) -> None:
    with pytest.raises(InvalidRequest, match="request_id"):
        check_request_id(bad)

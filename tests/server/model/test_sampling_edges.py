"""Sampling where it is easily wrong: ties, infinities, NaN, tiny temperatures, and neighbours in the batch."""

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch

from perseid_server.model.sampling import sample
from tests.server.model.test_sampling import random_logits, request, sampled

VOCAB = 49152
INF = math.inf
TINIEST = 5e-324  # the smallest positive float


def test_a_forbidden_token_the_base_does_not_have_harms_nobody() -> None:
    """A config may name end tokens beyond the last row of the output head."""
    logits = torch.tensor([0.0, 3.0, 1.0])
    for forbid, token in (((7,), 1), ((1, 7), 2)):
        assert sampled(logits, temperature=0.0, forbid=forbid).token_id == token


# --- ties -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 0},
        {"temperature": 0.0, "presence_penalty": 1.0},
        {"top_k": 1},
        {"top_p": 1e-9},
        {"temperature": TINIEST, "top_k": 1},
    ],
    ids=str,
)
def test_the_lowest_of_tied_tokens_wins(params: dict[str, Any]) -> None:
    logits = torch.zeros(VOCAB)
    tied = [40000, 123, 49151, 31000]
    logits[tied] = 7.5
    assert sampled(logits, uniform=0.999, **params).token_id == 123


def test_ties_at_the_border_of_top_k_go_to_the_lowest() -> None:
    logits = torch.tensor([1.0, 5.0, 1.0, 1.0, 1.0])
    drawn = {one.token_id for one in sample(logits.expand(200, -1), [request(i / 200, top_k=3) for i in range(200)])}
    assert drawn == {0, 1, 2}


def test_tied_logprobs_are_listed_by_id() -> None:
    found = sampled(torch.tensor([0.0, 2.0, 1.0, 1.0, 1.0]), temperature=0.0, logprobs=3).logprob
    assert [token for token, _ in found.top] == [1, 2, 3]


def test_top_k_of_one_is_greedy_over_a_whole_vocabulary() -> None:
    logits = random_logits(1, VOCAB)
    for uniform in (0.0, 0.5, math.nextafter(1.0, 0.0)):
        assert sampled(logits, uniform=uniform, top_k=1).token_id == int(logits.argmax())


# --- extremes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, sys.float_info.min, TINIEST])
@pytest.mark.filterwarnings("error")
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = random_logits(2) * 1e30
    assert sampled(logits, uniform=0.999, temperature=temperature).token_id == int(logits.argmax())


@pytest.mark.filterwarnings("error")
def test_large_logits_do_not_overflow() -> None:
    largest = float(np.finfo(np.float32).max)
    found = sampled(torch.tensor([-largest, largest, 0.0]), temperature=0.7, top_p=0.9, logprobs=3)
    assert found.token_id == 1
    assert found.logprob.logprob == 0.0


@pytest.mark.parametrize("uniform", [0.0, math.nextafter(1.0, 0.0)])
@pytest.mark.parametrize("params", [{}, {"top_k": 50}, {"top_p": 0.99}, {"min_p": 0.3}], ids=str)
def test_the_ends_of_the_interval_never_draw_an_impossible_token(uniform: float, params: dict[str, Any]) -> None:
    logits = torch.tensor([-INF, 1.0, -INF, 2.0, 1.0, -INF])
    assert sampled(logits, uniform=uniform, **params).token_id in {1, 3, 4}


def test_logprobs_of_impossible_tokens_are_minus_infinity() -> None:
    found = sampled(torch.tensor([0.0, -INF, 0.0]), temperature=0.0, logprobs=3).logprob
    assert found.top == ((0, pytest.approx(math.log(0.5))), (2, pytest.approx(math.log(0.5))), (1, -INF))


# --- rows that cannot be sampled --------------------------------------------------------------------------------

PARAMS = [
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 0.9},
    {"top_k": 3},
    {"top_p": 0.5},
    {"min_p": 0.1, "presence_penalty": 0.5, "output": (1,)},
]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([0.0, math.nan, 1.0], "NaN"),
        ([math.nan] * 3, "NaN"),
        ([INF, math.nan, 0.0], "NaN"),
        ([-INF] * 3, "no finite largest logit (-inf)"),
        ([0.0, INF, 1.0], "no finite largest logit (inf)"),
    ],
)
@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.filterwarnings("error")
def test_a_broken_row_is_an_error_for_that_row_only(row: list[float], said: str, params: dict[str, Any]) -> None:
    whole = [0.5, 3.0, 1.0]
    requests = [request(0.3, **params)] * 3
    before, broken, after = sample(torch.tensor([whole, row, whole]), requests)
    assert said in broken.error
    alone = sample(torch.tensor([whole]), requests[:1])[0]
    assert before == after == alone
    assert alone.error is None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_left_to_choose_is_an_error(temperature: float) -> None:
    logits = torch.tensor([1.0, -INF, 2.0])
    found = sampled(logits, temperature=temperature, forbid=(0, 2))
    assert "no token can be chosen" in found.error
    assert sampled(logits, temperature=temperature, forbid=(0,)).token_id == 2


def test_no_rows() -> None:
    assert sample(torch.empty(0, 8), []) == []


# --- neighbours -------------------------------------------------------------------------------------------------

MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 5},
    {"temperature": 0.8, "top_p": 0.9, "logprobs": 3},
    {"temperature": 1.2, "top_k": 40},
    {"min_p": 0.05, "repetition_penalty": 1.1, "prompt": (1, 2, 3), "output": (4, 5)},
    {"presence_penalty": 0.5, "frequency_penalty": 0.5, "output": (7, 7), "logit_bias": ((9, 3.0),)},
    {"forbid": (0, 1, 2)},
]


def test_a_row_is_sampled_alike_alone_and_among_others() -> None:
    """Bit for bit: tokens and log-probabilities, whatever stands beside the row and wherever it stands."""
    rows = torch.stack([random_logits(seed, 5000) for seed in range(len(MIXED))])
    requests = [request(0.1 + 0.12 * i, **params) for i, params in enumerate(MIXED)]
    alone = [sample(rows[i : i + 1], requests[i : i + 1])[0] for i in range(len(MIXED))]
    assert sample(rows, requests) == alone
    assert sample(rows.flip(0), requests[::-1]) == alone[::-1]
    broken = torch.full_like(rows, math.nan)
    among_broken = sample(torch.stack((broken, rows), dim=1).flatten(0, 1), [r for r in requests for _ in range(2)])
    assert among_broken[1::2] == alone


def test_the_row_number_alone_decides() -> None:
    """The same numbers give the same tokens again; other numbers give others."""
    logits = random_logits(3, 5000).expand(40, -1)
    numbers = np.random.default_rng(5).random((2, 40))

    def draw(uniforms: np.ndarray) -> list[int]:
        return [one.token_id for one in sample(logits, [request(u, temperature=1.5) for u in uniforms])]

    assert draw(numbers[0]) == draw(numbers[0])
    assert draw(numbers[0]) != draw(numbers[1])


def test_logits_are_left_as_they_were() -> None:
    logits = random_logits(4)[None]
    kept = logits.clone()
    sample(logits, [request(0.5, temperature=0.5, output=(1, 2), presence_penalty=1.0, forbid=(3,), logprobs=2)])
    assert torch.equal(logits, kept)

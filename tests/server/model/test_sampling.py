"""Sampling against its definitions: transformers' processors where they have one, plain numpy where they do not."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as theirs

from perseid_server.model.sampling import Sampled, Sampler, SampleRequest, prompt_logprobs, sample
from perseid_server.model.sampling_params import SamplingParams

NUM_DRAWS = 2000


def request(
    uniform: float = 0.5,
    prompt: tuple[int, ...] = (),
    output: tuple[int, ...] = (),
    forbid: tuple[int, ...] = (),
    **params: Any,
) -> SampleRequest:
    return SampleRequest(SamplingParams(max_tokens=8, **params), prompt, output, uniform, forbid)


def random_logits(seed: int, vocab_size: int = 24) -> Tensor:
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def sampled(logits_V: Tensor, **settings: Any) -> Sampled:
    return sample(logits_V[None], [request(**settings)])[0]


def distribution(logits_V: Tensor, **settings: Any) -> np.ndarray:
    """How often each token is drawn when the row's number runs evenly through [0, 1).

    Every token owns one interval of the row's number, as long as it is likely: counts are exact to one draw.
    """
    requests = [request((i + 0.5) / NUM_DRAWS, **settings) for i in range(NUM_DRAWS)]
    tokens = [one.token_id for one in sample(logits_V.expand(NUM_DRAWS, -1), requests)]
    return np.bincount(tokens, minlength=len(logits_V)) / NUM_DRAWS


def assert_distribution(actual: np.ndarray, logits_V: Tensor) -> None:
    """`actual` is softmax(logits), and nothing else is ever drawn."""
    expected = logits_V.double().softmax(-1).numpy()
    assert np.abs(actual - expected).max() <= 1.01 / NUM_DRAWS
    assert not actual[expected == 0].any()


# --- temperature and what cuts the tail -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 1.7},
        {"top_k": 5},
        {"top_k": 1000},
        {"top_p": 0.6},
        {"top_p": 1e-9},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"temperature": 1.5, "min_p": 0.02, "top_k": 9, "top_p": 0.8},
        {"temperature": 0.7, "top_k": 12, "top_p": 0.95},
        {"temperature": 2.0, "min_p": 0.05, "top_p": 0.9},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1])
def test_filters_are_those_of_transformers(params: dict[str, float], seed: int) -> None:
    logits = random_logits(seed)
    scores = theirs.TemperatureLogitsWarper(float(params.get("temperature", 1.0)))(None, logits[None].double())
    if "min_p" in params:
        scores = theirs.MinPLogitsWarper(params["min_p"])(None, scores)
    if "top_k" in params:
        scores = theirs.TopKLogitsWarper(params["top_k"])(None, scores)
    if "top_p" in params:
        scores = theirs.TopPLogitsWarper(params["top_p"])(None, scores)
    assert_distribution(distribution(logits, **params), scores[0])


def test_top_p_over_a_flat_vocabulary_keeps_thousands() -> None:
    """More tokens than are sorted at first: 60 % of 49152 equal ones, the lowest ids."""
    logits = torch.zeros(49152)
    numbers = torch.linspace(0, 1, 50, dtype=torch.float64)[:-1].tolist()
    drawn = [one.token_id for one in sample(logits.expand(49, -1), [request(u, top_p=0.6) for u in numbers])]
    assert drawn == [math.floor(u * math.ceil(0.6 * 49152)) for u in numbers]


def test_draws_pass_a_chi_square_test() -> None:
    """Seven degrees of freedom: a right sampler exceeds 24.3 once in a thousand seeds; this seed is fixed."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, 0.0, -1.0, -1.5, -2.0])
    numbers = np.random.default_rng(11).random(6000)
    drawn = [one.token_id for one in sample(logits.expand(6000, -1), [request(u, temperature=1.3) for u in numbers])]
    expected = (logits.double() / 1.3).softmax(-1).numpy() * 6000
    assert (((np.bincount(drawn, minlength=8) - expected) ** 2) / expected).sum() < 24.3


# --- penalties, bias, forbidden tokens --------------------------------------------------------------------------

PROMPT, OUTPUT = (3, 4, 4, 9), (4, 7, 7, 7, 20)


def penalised(logits_V: Tensor, repetition: float = 1.0, presence: float = 0.0, frequency: float = 0.0) -> Tensor:
    """vLLM's documented definitions, token by token."""
    values = logits_V.clone()
    for token in range(len(values)):
        if token in PROMPT or token in OUTPUT:
            values[token] = values[token] / repetition if values[token] > 0 else values[token] * repetition
        count = OUTPUT.count(token)
        values[token] -= frequency * count + presence * (count > 0)
    return values


@pytest.mark.parametrize("repetition", [1.0, 1.3, 0.7])
@pytest.mark.parametrize(("presence", "frequency"), [(0.0, 0.0), (1.5, 0.0), (0.0, 0.8), (-0.5, 0.3)])
def test_penalties(repetition: float, presence: float, frequency: float) -> None:
    logits = random_logits(4)
    drawn = distribution(
        logits,
        prompt=PROMPT,
        output=OUTPUT,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
    )
    assert_distribution(drawn, penalised(logits, repetition, presence, frequency))


@pytest.mark.parametrize("penalty", [1.2, 0.8])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = random_logits(5)
    scores = theirs.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([[*PROMPT, *OUTPUT]]), logits[None])
    assert_distribution(distribution(logits, prompt=PROMPT, output=OUTPUT, repetition_penalty=penalty), scores[0])


def test_penalties_of_a_first_token_see_the_prompt_only_for_repetition() -> None:
    logits = random_logits(6)
    drawn = distribution(logits, prompt=PROMPT, presence_penalty=2.0, frequency_penalty=2.0)
    assert_distribution(drawn, logits)


def test_penalties_move_a_greedy_choice() -> None:
    logits = torch.tensor([1.0, 3.0, 2.5])
    assert sampled(logits, temperature=0.0).token_id == 1
    assert sampled(logits, temperature=0.0, output=(1,), presence_penalty=0.6).token_id == 2


def test_logit_bias_and_forbidden_tokens() -> None:
    logits = random_logits(7)
    expected = logits.clone()
    expected[2] += 4.0
    expected[5] -= 100.0
    expected[[8, 9]] = -math.inf
    drawn = distribution(logits, logit_bias=((2, 4.0), (5, -100.0), (8, 50.0)), forbid=(8, 9))
    assert_distribution(drawn, expected)


def test_order_is_bias_then_penalties_then_temperature_then_filters() -> None:
    logits = random_logits(8)
    biased = logits.clone()
    biased[4] += 3.0
    scores = penalised(biased, 1.4, 0.2, 0.1)[None].double() / 0.8
    scores = theirs.TopKLogitsWarper(6)(None, theirs.MinPLogitsWarper(0.01)(None, scores))
    drawn = distribution(
        logits,
        prompt=PROMPT,
        output=OUTPUT,
        logit_bias=((4, 3.0),),
        repetition_penalty=1.4,
        presence_penalty=0.2,
        frequency_penalty=0.1,
        temperature=0.8,
        min_p=0.01,
        top_k=6,
    )
    assert_distribution(drawn, scores[0])


# --- log-probabilities ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_top", [0, 1, 5, 24, 1000])
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_logprobs_are_those_of_the_raw_logits(num_top: int, temperature: float) -> None:
    logits = random_logits(9)
    expected = logits.double().log_softmax(-1)
    found = sampled(logits, temperature=temperature, logprobs=num_top, logit_bias=((3, 100.0),)).logprob
    assert found is not None
    assert found.token_id == 3
    assert found.logprob == pytest.approx(expected[3].item(), abs=1e-9)
    assert found.rank == 1 + int((expected > expected[3]).sum())
    values, tokens = expected.sort(descending=True)
    wanted = min(num_top, 24)
    assert [token for token, _ in found.top] == tokens[:wanted].tolist()
    assert [value for _, value in found.top] == pytest.approx(values[:wanted].tolist(), abs=1e-9)


def test_prompt_logprobs_judge_the_token_that_follows() -> None:
    logits = torch.stack([random_logits(seed) for seed in (10, 11, 12)])
    found = prompt_logprobs(logits, [5, 0, 23], 2)
    expected = logits.double().log_softmax(-1)
    for row, (token, one) in enumerate(zip((5, 0, 23), found, strict=True)):
        assert one.token_id == token
        assert one.logprob == pytest.approx(expected[row, token].item(), abs=1e-9)
        assert one.top[0][0] == int(expected[row].argmax())
        assert len(one.top) == 2


def typical(logits_V: Tensor, tokens: list[int], epsilon: float = 0.09, delta: float = 0.3, **params: Any) -> Any:
    return Sampler(logits_V[None]).accept_typical(0, request(**params), tokens, epsilon, delta)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("params", [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}, {"min_p": 0.1}])
def test_typical_drafts_are_those_above_the_threshold(seed: int, params: dict[str, float]) -> None:
    """p(x) > min(ε, δ · e^(−H)), p being what would be sampled from."""
    logits = random_logits(seed)
    p = distribution(logits, **params)
    threshold = min(0.09, 0.3 * math.exp(sum(each * math.log(each) for each in p if each)))
    for token in range(len(p)):
        if abs(p[token] - threshold) > 2e-3:  # the counts are exact to one draw
            accepted = typical(logits, [token], **params)
            assert (accepted is not None) == (p[token] > threshold)
            assert accepted is None or accepted.token_id == token


def test_of_several_typical_drafts_the_likeliest() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 1.5])
    accepted = typical(logits, [1, 3, 0], temperature=1.0, logprobs=1)
    assert accepted.token_id == 3
    assert accepted.logprob.logprob == pytest.approx(float(logits.log_softmax(0)[3]))


def test_nothing_is_typical_of_a_greedy_or_broken_row() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    assert typical(logits, [2], temperature=0.0) is None
    assert typical(logits, [], temperature=1.0) is None
    assert typical(torch.tensor([0.0, float("nan"), 1.0]), [2], temperature=1.0) is None
    assert typical(logits, [2], temperature=1.0, forbid=(0, 1, 2)) is None


def test_a_row_may_be_sampled_again_and_again() -> None:
    """With other tokens before it and another random number, as drafts of one tree are not; it stays what it is."""
    logits = torch.stack((random_logits(1), random_logits(2)))
    sampler = Sampler(logits)
    first = [sampler.sample(row, request(0.3, temperature=1.0, repetition_penalty=2.0)) for row in (0, 1, 0)]
    assert first[0] == first[2]
    assert first[:2] == sample(logits, [request(0.3, temperature=1.0, repetition_penalty=2.0)] * 2)

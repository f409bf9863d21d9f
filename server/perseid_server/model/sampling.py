"""Choosing the next token of each row.

The order is vLLM's: logit bias → forbidden tokens → repetition, frequency and presence penalties → temperature →
min_p → top_k → top_p → draw. Log-probabilities are those of the raw logits, before all of it.

A drawn token is the inverse of the cumulative distribution at the row's own random number, so it depends on that
row's logits and number alone, never on the rest of the batch. Sums are float64.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from perseid_kernels.best import best
from perseid_server.model.sampling_params import SamplingParams, TokenLogprobs

Logits = NDArray[np.float32]

FindBest = Callable[[Tensor], tuple[Tensor, Tensor]]
"""`Backend.best`"""


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """What one row of logits is sampled with."""

    sampling: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    uniform: float  # the row's own draw from [0, 1)
    forbid_token_ids: tuple[int, ...] = ()  # end tokens, while min_tokens is not reached


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token of one row, or why there is none."""

    token_id: int
    logprob: TokenLogprobs | None = None
    error: str | None = None


class Sampler:
    """Samples from the rows of a step's float32 logits, each as often as is asked. A broken row gets an error; the
    others are unharmed."""

    def __init__(self, logits_LV: Tensor, find_best: FindBest = best) -> None:
        self._logits_LV = logits_LV
        # by one copy from the device: float64 holds both exactly
        values_L, indices_L = find_best(logits_LV)
        self._best: list[list[float]] = torch.stack((values_L.double(), indices_L.double())).tolist()

    def sample(self, row: int, request: SampleRequest) -> Sampled:
        """The row's token."""
        value, index = self._best[0][row], self._best[1][row]
        if not math.isfinite(value):
            what = "NaN" if math.isnan(value) else f"no finite largest logit ({value})"
            return Sampled(0, error=f"the model produced {what}; the adapter or the base is broken")
        if _is_plain_greedy(request):
            return Sampled(int(index))
        return _sample_row(self._row(row), request)

    def accept_typical(
        self, row: int, request: SampleRequest, tokens: Sequence[int], epsilon: float, delta: float
    ) -> Sampled | None:
        """The likeliest of some drafted tokens, if it is typical: p(x) > min(ε, δ · e^(−H)), with H the entropy of the
        distribution p that would be sampled from (Medusa, arXiv:2401.10774, section 3.3.1). None otherwise, and for a
        greedy request."""
        if request.sampling.temperature == 0.0 or not tokens or not math.isfinite(self._best[0][row]):
            return None
        raw = self._row(row)
        logits = _penalised(raw, request)
        if not np.isfinite(logits.max()):
            return None
        candidates = _filtered(logits, request.sampling)
        p = candidates.weights / candidates.weights.sum()
        likely = p[p > 0.0]
        threshold = min(epsilon, delta * math.exp(float((likely * np.log(likely)).sum())))
        chance = {token: float(p[candidates.tokens == token].sum()) for token in tokens}
        token = max(tokens, key=chance.__getitem__)
        return Sampled(token, _logprob_of(raw, token, request)) if chance[token] > threshold else None

    def _row(self, row: int) -> Logits:
        return self._logits_LV[row].cpu().numpy()


def sample(logits_LV: Tensor, requests: Sequence[SampleRequest], find_best: FindBest = best) -> list[Sampled]:
    """One token for each row."""
    if not requests:
        return []
    sampler = Sampler(logits_LV, find_best)
    return [sampler.sample(row, request) for row, request in enumerate(requests)]


def _is_plain_greedy(request: SampleRequest) -> bool:
    params = request.sampling
    untouched = (
        params.repetition_penalty == 1.0
        and params.presence_penalty == 0.0
        and params.frequency_penalty == 0.0
        and not params.logit_bias
        and not request.forbid_token_ids
    )
    return params.temperature == 0.0 and untouched and params.logprobs is None


def _sample_row(raw: Logits, request: SampleRequest) -> Sampled:
    params = request.sampling
    logits = _penalised(raw, request)
    if not np.isfinite(logits.max()):
        return Sampled(0, error="no token can be chosen: all are forbidden, or a penalty is out of range")
    if params.temperature == 0.0:
        token = int(logits.argmax())
    else:
        token = _draw(_filtered(logits, params), request.uniform)
    return Sampled(token, _logprob_of(raw, token, request))


def _logprob_of(raw: Logits, token: int, request: SampleRequest) -> TokenLogprobs | None:
    num_top = request.sampling.logprobs
    return None if num_top is None else token_logprobs(raw, token, num_top)


def _penalised(raw: Logits, request: SampleRequest) -> Logits:
    """Bias, forbidden tokens and penalties. Tokens of the prompt count for repetition only."""
    params = request.sampling
    logits = raw.copy()
    for token, bias in params.logit_bias:
        logits[token] += np.float32(bias)
    forbidden = [token for token in request.forbid_token_ids if token < len(logits)]
    if forbidden:
        logits[forbidden] = -np.inf
    if params.repetition_penalty != 1.0:
        seen = list({*request.prompt_token_ids, *request.output_token_ids})
        values = logits[seen]
        penalty = np.float32(params.repetition_penalty)
        logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    if (params.frequency_penalty or params.presence_penalty) and request.output_token_ids:
        counts = Counter(request.output_token_ids)
        times = np.fromiter(counts.values(), dtype=np.float32)
        logits[list(counts)] -= np.float32(params.frequency_penalty) * times + np.float32(params.presence_penalty)
    return logits


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Tokens that may be drawn and their float64 weights (probabilities, not normalised)."""

    tokens: NDArray[np.int64]
    weights: NDArray[np.float64]


def _filtered(logits: Logits, params: SamplingParams) -> _Candidates:
    """Temperature, min_p, top_k and top_p, each over what the one before leaves."""
    below_peak = logits.astype(np.float64) - logits.max()
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the largest to -inf
        weights = np.exp(below_peak / params.temperature)
    if params.min_p > 0.0:
        weights[weights < params.min_p] = 0.0  # the largest weight is 1
    if params.top_k > 0:
        tokens = _most_likely(weights, params.top_k)
        wanted = params.top_p * weights[tokens].sum()
    elif params.top_p < 1.0:
        wanted = params.top_p * weights.sum()
        tokens = _enough(weights, wanted)
    else:
        return _Candidates(np.arange(len(weights)), weights)
    return _cut(tokens, weights[tokens], wanted) if params.top_p < 1.0 else _Candidates(tokens, weights[tokens])


def _cut(tokens: NDArray[np.int64], weights: NDArray[np.float64], wanted: float) -> _Candidates:
    """The first tokens whose weights sum to `wanted`; the one that crosses the line is in."""
    keep = int(np.searchsorted(np.cumsum(weights), wanted, side="left")) + 1
    return _Candidates(tokens[:keep], weights[:keep])


def _most_likely(weights: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """The `count` heaviest tokens, heaviest first, ties by id."""
    if count >= len(weights):
        return np.argsort(-weights, kind="stable")
    least = np.partition(weights, -count)[-count]
    above, tied = np.flatnonzero(weights > least), np.flatnonzero(weights == least)
    return np.concatenate((above[np.argsort(-weights[above], kind="stable")], tied[: count - len(above)]))


def _enough(weights: NDArray[np.float64], wanted: float) -> NDArray[np.int64]:
    """Heaviest tokens that sum to `wanted` at least. Sorting the whole vocabulary is rarely needed."""
    for count in (256, 4096):
        tokens = _most_likely(weights, count)
        if weights[tokens].sum() >= wanted:
            return tokens
    return _most_likely(weights, len(weights))


def _draw(candidates: _Candidates, uniform: float) -> int:
    cumulative = np.cumsum(candidates.weights)
    index = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return int(candidates.tokens[min(index, len(candidates.tokens) - 1)])


def token_logprobs(raw: Logits, token: int, num_top: int) -> TokenLogprobs:
    """Log-probability and rank of `token`, and the `num_top` most likely tokens, under softmax(raw)."""
    logits = raw.astype(np.float64)
    peak = logits.max()
    log_total = peak + np.log(np.exp(logits - peak).sum())
    rank = int(np.count_nonzero(logits > logits[token])) + 1
    top: tuple[tuple[int, float], ...] = ()
    if num_top > 0:
        top = tuple((index, float(logits[index] - log_total)) for index in _most_likely(logits, num_top).tolist())
    return TokenLogprobs(token, float(logits[token] - log_total), rank, top)


def prompt_logprobs(logits_LV: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Row i of the logits judges `token_ids[i]`, the prompt token that follows it."""
    rows = logits_LV.to(torch.float32).cpu().numpy()
    return [token_logprobs(rows[i], token, num_top) for i, token in enumerate(token_ids)]

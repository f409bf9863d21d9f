"""Training the request-level router (request_router.py): seconds on a CPU, the same for the same seed. NumPy only.

1. A fifth of each class's prompts is held out. Prompts of "several" are made, in both parts, by joining the
   prompts of two or three adapters within the template that all prompts have.
2. The n-grams that at least two prompts of a class have, the commonest of each class in turn, become the buckets
   that are `seen`: an eighth of all, so that an unknown n-gram is rarely taken for a known one.
3. W and b: softmax regression with weights that make the classes equally many, by Adam.
4. On the held-out prompts: `floor` is the share that all but 2 % of a class's prompts know; `threshold` is the
   lowest probability from which on the choice of an adapter is right in at least `precision` of all cases.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perseid_router.request_router import (
    BASE,
    HASH_BITS,
    RequestRouter,
    bucket_of,
    count_buckets,
    features,
    ngram_hashes,
)

LOWEST_THRESHOLD = 0.6
_FLOOR_QUANTILE = 0.02
_SEEN_SHARE = 8  # one in so many buckets
_BATCH = 128
_STEPS = 1500
_LEARNING_RATE = 0.1
_WEIGHT_DECAY = 1e-4


@dataclass(frozen=True, slots=True)
class RouterSample:
    """A prompt, rendered and tokenized as the server does it, and what it is for: a column, or BASE."""

    token_ids: tuple[int, ...]
    column: int


def fit(
    samples: Sequence[RouterSample],
    num_adapters: int,
    *,
    seed: int = 0,
    hash_bits: int = HASH_BITS,
    held_out: float = 0.2,
    precision: float = 0.995,
) -> RequestRouter:
    """Train on prompts of the adapters and, better, of the base (generic text). ValueError where an adapter has < 5."""
    random = np.random.default_rng(seed)
    by_class = _by_class(samples, num_adapters)
    known, judged = _split(by_class, held_out, random)
    template = _template([sample.token_ids for sample in samples])
    for part in (known, judged):
        part[num_adapters + 1] = _several(part[:num_adapters], template, random)
    seen_buckets = _choose_buckets(known[: num_adapters + 1], hash_bits)
    telling, seen = _weigh_buckets(known[: num_adapters + 1], seen_buckets, hash_bits)
    weight, bias = _regress(known, telling, seen_buckets, hash_bits, random)
    draft = RequestRouter(weight, bias, np.zeros_like(bias), telling, seen, hash_bits, 1.0)
    return _calibrate(draft, judged, precision)


Prompts = list[tuple[int, ...]]


def _by_class(samples: Sequence[RouterSample], num_adapters: int) -> list[Prompts]:
    by_class: list[Prompts] = [[] for _ in range(num_adapters + 2)]
    for sample in samples:
        if not (sample.column == BASE or 0 <= sample.column < num_adapters):
            raise ValueError(f"column {sample.column}: expected 0 to {num_adapters - 1}, or BASE ({BASE})")
        by_class[num_adapters if sample.column == BASE else sample.column].append(sample.token_ids)
    for column, prompts in enumerate(by_class[:num_adapters]):
        if len(prompts) < 5:
            raise ValueError(f"column {column} has {len(prompts)} prompts; the request router needs at least 5 of each")
    return by_class


def _split(
    by_class: list[Prompts], held_out: float, random: np.random.Generator
) -> tuple[list[Prompts], list[Prompts]]:
    known, judged = [], []
    for prompts in by_class:
        order = random.permutation(len(prompts))
        cut = int(np.ceil(len(prompts) * held_out))
        judged.append([prompts[index] for index in order[:cut]])
        known.append([prompts[index] for index in order[cut:]])
    return known, judged


def _template(prompts: Prompts) -> tuple[int, int]:
    """How many tokens all prompts begin and end with."""
    shortest = min(len(prompt) for prompt in prompts)
    first = prompts[0]
    start = end = 0
    while start < shortest and all(prompt[start] == first[start] for prompt in prompts):
        start += 1
    while end < shortest - start and all(prompt[-1 - end] == first[-1 - end] for prompt in prompts):
        end += 1
    return start, end


def _several(by_adapter: list[Prompts], template: tuple[int, int], random: np.random.Generator) -> Prompts:
    """As many prompts as an adapter has on average, each joining the bodies of those of two or three adapters."""
    if len(by_adapter) < 2:
        return []
    start, end = template
    joined: Prompts = []
    for _ in range(int(np.mean([len(prompts) for prompts in by_adapter]))):
        chosen = random.choice(len(by_adapter), size=min(int(random.integers(2, 4)), len(by_adapter)), replace=False)
        parts = [by_adapter[column][int(random.integers(len(by_adapter[column])))] for column in chosen]
        body = sum((part[start : len(part) - end] for part in parts), ())
        joined.append(parts[0][:start] + body + parts[0][len(parts[0]) - end :])
    return joined


def _choose_buckets(by_class: list[Prompts], hash_bits: int) -> NDArray[np.int64]:
    """Buckets of the n-grams that are commonest in some class, ascending."""
    ranked = []
    for prompts in by_class:
        found: Counter[int] = Counter()
        for prompt in prompts:
            found.update(np.unique(ngram_hashes(prompt)).tolist())
        common = [(-count, ngram) for ngram, count in found.items() if count > 1]
        ranked.append([ngram for _, ngram in sorted(common)])
    chosen: dict[int, None] = {}
    for ngrams in zip_longest(*ranked):
        if len(chosen) >= (1 << hash_bits) // _SEEN_SHARE:
            break
        chosen |= dict.fromkeys(ngram for ngram in ngrams if ngram is not None)
    return np.unique(bucket_of(np.array(list(chosen), np.uint64), hash_bits))


def _weigh_buckets(
    by_class: list[Prompts], seen_buckets: NDArray[np.int64], hash_bits: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(u, seen)"""
    shares = []
    for prompts in by_class:
        if prompts:
            having = np.zeros(1 << hash_bits, np.float32)
            for prompt in prompts:
                having[count_buckets(prompt, hash_bits)[0]] += 1
            shares.append(having / len(prompts))
    seen = np.zeros(1 << hash_bits, np.float32)
    seen[seen_buckets] = 1
    telling = np.where(seen > 0, 1 - np.mean(shares, axis=0), 1).astype(np.float32)
    return telling, seen


def _regress(
    by_class: list[Prompts],
    telling: NDArray[np.float32],
    seen_buckets: NDArray[np.int64],
    hash_bits: int,
    random: np.random.Generator,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(W, b) that minimise the cross-entropy. Each batch draws its classes evenly."""
    place = np.full(1 << hash_bits, -1)
    place[seen_buckets] = np.arange(len(seen_buckets))
    rows = [[_row(prompt, telling, place, hash_bits) for prompt in prompts] for prompts in by_class]
    classes = [index for index, of_class in enumerate(rows) if of_class]
    w = np.zeros((len(seen_buckets), len(by_class)), np.float32)
    b = np.zeros(len(by_class), np.float32)
    b[[index for index, of_class in enumerate(rows) if not of_class]] = -30.0  # a class without prompts is never chosen
    descend_w, descend_b = _Adam(w), _Adam(b)
    for step in range(_STEPS):
        labels = random.choice(classes, _BATCH)
        x = np.zeros((_BATCH, len(seen_buckets)), np.float32)
        for index, label in enumerate(labels):
            columns, values = rows[label][int(random.integers(len(rows[label])))]
            x[index, columns] = values
        residual = _softmax(x @ w + b)
        residual[np.arange(_BATCH), labels] -= 1
        residual /= _BATCH
        rate = _LEARNING_RATE * (1 - step / _STEPS)
        descend_w.step(x.T @ residual + _WEIGHT_DECAY * w, rate)
        descend_b.step(residual.sum(axis=0), rate)
    weight = np.zeros((1 << hash_bits, len(by_class)), np.float32)
    weight[seen_buckets] = w
    return weight, b


def _row(
    prompt: tuple[int, ...], telling: NDArray[np.float32], place: NDArray[np.int64], hash_bits: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """x of the seen buckets: (their places, values)."""
    buckets, counts = count_buckets(prompt, hash_bits)
    x = features(telling[buckets], counts)
    places = place[buckets]
    return places[places >= 0], x[places >= 0]


class _Adam:
    """Kingma & Ba (arXiv:1412.6980), on one parameter, in place."""

    def __init__(self, parameter: NDArray[np.float32]) -> None:
        self._parameter = parameter
        self._mean = np.zeros_like(parameter)
        self._square = np.zeros_like(parameter)
        self._count = 0

    def step(self, gradient: NDArray[np.float32], rate: float) -> None:
        """One step down."""
        self._count += 1
        self._mean += 0.1 * (gradient - self._mean)
        self._square += 0.001 * (np.square(gradient) - self._square)
        spread = np.sqrt(self._square / (1 - 0.999**self._count)) + 1e-8
        self._parameter -= rate / (1 - 0.9**self._count) * self._mean / spread


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    normalised: NDArray[np.float32] = shares / shares.sum(axis=1, keepdims=True)
    return normalised


def _calibrate(draft: RequestRouter, by_class: list[Prompts], precision: float) -> RequestRouter:
    """The draft with its floors and threshold, and what they bring on these prompts."""
    truths = np.array([label for label, prompts in enumerate(by_class) for _ in prompts])
    evidence = [draft.evidence(prompt) for prompts in by_class for prompt in prompts]
    known = np.array([item.known for item in evidence])
    floor = np.array(
        [
            np.quantile(known[truths == label], _FLOOR_QUANTILE) if prompts else 1.0
            for label, prompts in enumerate(by_class)
        ]
    ).astype(np.float32)
    winners = np.array([int(item.probabilities.argmax()) for item in evidence])
    confidence = np.array([float(item.probabilities.max()) for item in evidence])
    candidates = (winners < draft.num_adapters) & (known >= floor[winners])
    threshold = _threshold(confidence[candidates], (winners == truths)[candidates], precision)
    decided = candidates & (confidence >= threshold)
    calibration = _report(decided, winners, truths, draft.num_adapters)
    return RequestRouter(
        draft.weight, draft.bias, floor, draft.telling, draft.seen, draft.hash_bits, threshold, calibration
    )


def _threshold(confidence: NDArray[np.float64], right: NDArray[np.bool_], precision: float) -> float:
    """The lowest from which on the share of right ones reaches the precision; beyond 1 (never) where there is none."""
    order = np.argsort(-confidence, kind="stable")
    share = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
    last_of_equals = np.append(confidence[order][1:] != confidence[order][:-1], True)[: len(order)]
    good = np.flatnonzero((share >= precision) & last_of_equals)
    return max(LOWEST_THRESHOLD, float(confidence[order][good[-1]])) if len(good) else 2.0


def _report(
    decided: NDArray[np.bool_], winners: NDArray[np.int64], truths: NDArray[np.int64], num_adapters: int
) -> dict[str, Any]:
    of_adapters = truths < num_adapters
    return {
        "prompts": len(truths),
        "precision": float((winners == truths)[decided].mean()) if decided.any() else None,
        "decided": float(decided[of_adapters].mean()),  # of the adapters' prompts; token gates get the others
    }

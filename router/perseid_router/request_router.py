"""The request-level router: one adapter, or the base, for a whole request, where its prompt leaves no doubt.

The features are the prompt's 1-, 2- and 3-grams of tokens, hashed into F buckets; the classes are the adapters, the
base, and "several" (a prompt that asks for more than one of them). For a prompt in whose bucket f lie c_f n-grams:

    x_f = u_f · (1 + ln c_f),  scaled to Σ_f x_f² = 1        0 ≤ u_f ≤ 1: how telling the bucket is
    p   = softmax(Σ_f x_f · W_f + b)
    known = Σ_{f seen} x_f²                                    of the training's prompts

u_f is 1 minus the share of prompts, averaged over the classes, that have the bucket: n-grams of the chat template,
which every prompt has, tell nothing. A bucket that training did not see has W_f = 0 but u_f = 1: what is unknown about
a prompt takes its share of x and so flattens p. The likeliest class c is chosen if p_c reaches the threshold and
`known` reaches what is usual for prompts of that class (`floor`); otherwise token gates decide.

NumPy only: the API process routes. Training stands in request_router_training.py.

    gate_set.json      request_router: {hash_bits, threshold, calibration (for people)}
    gates.safetensors  request_router.weight [F, N + 2], .bias [N + 2], .floor [N + 2], .telling [F] (u), .seen [F]

Shape legend: F = 2^hash_bits buckets, N adapters; class N is the base, class N + 1 is "several".
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from perseid_router.gate_set_config import GateSetError, check_count, check_keys, check_number

BASE: Final = -1
"""Stands for the base where a column is asked for."""

HASH_BITS = 14
LONGEST_NGRAM = 3
_MIN_HASH_BITS, _MAX_HASH_BITS = 8, 16
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What a prompt tells."""

    probabilities: NDArray[np.float32]  # [N + 2]
    known: float  # 0 to 1


@dataclass(frozen=True, slots=True, eq=False)
class RequestRouter:
    """A trained router."""

    weight: NDArray[np.float32]  # [F, N + 2]
    bias: NDArray[np.float32]  # [N + 2]
    floor: NDArray[np.float32]  # [N + 2]
    telling: NDArray[np.float32]  # [F]
    seen: NDArray[np.float32]  # [F]
    hash_bits: int
    threshold: float
    calibration: dict[str, Any] = field(default_factory=dict)  # what the training measured; for people

    @property
    def num_adapters(self) -> int:
        """N."""
        return len(self.bias) - 2

    def decide(self, prompt_token_ids: Sequence[int], allowed: Collection[int]) -> int | None:
        """The adapter's column or BASE if the prompt leaves no doubt, else None: token gates decide.

        `allowed`: the columns that may be chosen, with BASE if the base may. A prompt for what is not allowed is not
        given to the next likely: that is None too.
        """
        evidence = self.evidence(prompt_token_ids)
        winner = int(evidence.probabilities.argmax())
        if winner > self.num_adapters:
            return None
        if evidence.probabilities[winner] < self.threshold or evidence.known < self.floor[winner]:
            return None
        column = BASE if winner == self.num_adapters else winner
        return column if column in allowed else None

    def evidence(self, prompt_token_ids: Sequence[int]) -> Evidence:
        """Probabilities of the classes, and how much of the prompt is known."""
        buckets, counts = count_buckets(prompt_token_ids, self.hash_bits)
        x = features(self.telling[buckets], counts)
        logits = x @ self.weight[buckets] + self.bias
        shares = np.exp(logits - logits.max())
        return Evidence(shares / shares.sum(), float(np.square(x) @ self.seen[buckets]))

    def config(self) -> dict[str, Any]:
        """The part that stands in gate_set.json."""
        return {"hash_bits": self.hash_bits, "threshold": self.threshold, "calibration": self.calibration}

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """The part that stands in gates.safetensors, names without the prefix."""
        return {
            "weight": self.weight, "bias": self.bias, "floor": self.floor, "telling": self.telling, "seen": self.seen,
        }  # fmt: skip

    @staticmethod
    def of(config: Mapping[str, Any], tensors: Mapping[str, NDArray[np.float32]], num_adapters: int) -> "RequestRouter":
        """The router of a gate set with so many adapters, everything checked. GateSetError names what is wrong."""
        check_keys("request_router", config, required=("hash_bits", "threshold"), optional=("calibration",))
        hash_bits = check_count("request_router.hash_bits", config["hash_bits"], _MIN_HASH_BITS, _MAX_HASH_BITS)
        threshold = check_number("request_router.threshold", config["threshold"])
        calibration = config.get("calibration", {})
        if not isinstance(calibration, dict):
            raise GateSetError(f"request_router.calibration: expected an object, got {type(calibration).__name__}")
        size, classes = 1 << hash_bits, num_adapters + 2
        shapes = {
            "weight": (size, classes),
            "bias": (classes,),
            "floor": (classes,),
            "telling": (size,),
            "seen": (size,),
        }
        _check_tensors(tensors, shapes)
        return RequestRouter(
            **{name: tensors[name] for name in shapes},
            hash_bits=hash_bits,
            threshold=threshold,
            calibration=calibration,
        )


def _check_tensors(tensors: Mapping[str, NDArray[np.float32]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name in tensors:
        if name not in shapes:
            raise GateSetError(f"unknown tensor 'request_router.{name}'; expected {', '.join(shapes)}")
    for name, shape in shapes.items():
        if name not in tensors:
            raise GateSetError(f"the tensor 'request_router.{name}' is missing, though the set has a request_router")
        values = tensors[name]
        if values.shape != shape:
            raise GateSetError(
                f"tensor 'request_router.{name}' has the shape {list(values.shape)}; expected {list(shape)}: a class "
                "for each adapter, one for the base, one for several, and 2^hash_bits buckets"
            )
        if not np.isfinite(values).all():
            raise GateSetError(f"tensor 'request_router.{name}' holds a value that is not finite")
        if name in {"telling", "seen"} and not ((values >= 0) & (values <= 1)).all():
            raise GateSetError(f"tensor 'request_router.{name}' holds a value outside of 0 to 1")


def features(telling: NDArray[np.float32], counts: NDArray[np.int64]) -> NDArray[np.float32]:
    """x of the buckets that a prompt has; all zero where nothing in it tells anything."""
    x = telling * (1 + np.log(counts.astype(np.float32)))
    norm = float(np.sqrt(np.square(x).sum()))
    scaled: NDArray[np.float32] = x / np.float32(norm) if norm > 0 else x
    return scaled


def count_buckets(token_ids: Sequence[int], hash_bits: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(buckets that some n-gram falls into, ascending; how many fall into each)."""
    buckets = bucket_of(ngram_hashes(token_ids), hash_bits)
    found, counts = np.unique(buckets, return_counts=True)
    return found, counts


def bucket_of(hashes: NDArray[np.uint64], hash_bits: int) -> NDArray[np.int64]:
    """The uppermost bits of each hash."""
    return (hashes >> np.uint64(64 - hash_bits)).astype(np.int64)


def ngram_hashes(token_ids: Sequence[int]) -> NDArray[np.uint64]:
    """64-bit hashes of all n-grams of 1 to LONGEST_NGRAM tokens, the same on every machine.

    h_0 = 0, h_{i+1} = mix(h_i + golden + token_i) modulo 2^64: the hash of an n-gram is h_n, its length included.
    """
    tokens = np.asarray(token_ids, np.int64).astype(np.uint64)
    hashes = []
    shorter = np.zeros(len(tokens), np.uint64)
    for length in range(1, min(LONGEST_NGRAM, len(tokens)) + 1):
        starts = len(tokens) - length + 1
        shorter = _mix(shorter[:starts] + _GOLDEN + tokens[length - 1 :])
        hashes.append(shorter)
    return np.concatenate(hashes) if hashes else shorter


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (https://prng.di.unimi.it/splitmix64.c)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

"""`perseid_heads.json`: what Perseid knows of Medusa heads beside their tensors. Standard library only.

The tensors beside it (`medusa_lm_head.safetensors`, in Medusa v2's names) are what other servers read too; heads from
elsewhere have no such file and get the defaults.
"""

import json
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

CONFIG_FILE = "perseid_heads.json"
TENSORS_FILE = "medusa_lm_head.safetensors"
SCHEMA = 1

MAX_HEADS = 8
RANKS = 10
"""Candidates of a head that the accuracy table tells of."""

PUBLISHED_TOP1 = (0.56, 0.32, 0.20, 0.15, 0.12)
"""Top-1 accuracy of the heads of a 7B model (Medusa, arXiv:2401.10774): taken for heads without a table."""


class HeadsConfigError(ValueError):
    """The file is not what it should be: names the field, what was expected and what stands there."""


@dataclass(frozen=True, slots=True)
class HeadsConfig:
    """Head h drafts the token h + 2 places after the one whose hidden state it sees (the base tells the next one)."""

    adapter: str | None = None  # content hash of the adapter the heads were trained for; None: for the base
    draft_vocabulary: tuple[int, ...] | None = None  # ascending token ids that the heads choose among; None: all
    accuracy: tuple[tuple[float, ...], ...] = ()  # [head][rank]: how often that candidate was right, ranks exclusive


def default_accuracy(num_heads: int) -> tuple[tuple[float, ...], ...]:
    """For heads that bring no table. Rank r is taken to be right 1 / (2 r + 1) as often as rank 0."""
    top1 = [PUBLISHED_TOP1[min(head, len(PUBLISHED_TOP1) - 1)] for head in range(num_heads)]
    return tuple(tuple((1.0 - p) * p / (rank + 1) if rank else p for rank in range(RANKS)) for p in top1)


def render_config(config: HeadsConfig, training: dict[str, Any] | None = None) -> bytes:
    """The file. `training` says how the heads were made, for people."""
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "adapter": config.adapter,
        "accuracy": [[round(p, 5) for p in of_head] for of_head in config.accuracy],
        "draft_vocabulary": None if config.draft_vocabulary is None else list(config.draft_vocabulary),
    }
    if training is not None:
        content["training"] = training
    return json.dumps(content, indent=None, sort_keys=True).encode()


def parse_config(raw: bytes, num_heads: int, vocab_size: int) -> HeadsConfig:
    """The configuration of heads over a vocabulary. HeadsConfigError for anything else."""
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise HeadsConfigError(f"{CONFIG_FILE}: not JSON") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise HeadsConfigError(f"{CONFIG_FILE}: schema: expected {SCHEMA}; train the heads again with this version")
    adapter = content.get("adapter")
    if adapter is not None and not _is_hash(adapter):
        raise HeadsConfigError(f"{CONFIG_FILE}: adapter: expected a content hash of 64 hexadecimal digits, or null")
    vocabulary = _vocabulary(content.get("draft_vocabulary"), vocab_size)
    accuracy = content.get("accuracy")
    if accuracy is None or accuracy == []:  # as `render_config` writes none
        return HeadsConfig(adapter, vocabulary, default_accuracy(num_heads))
    return HeadsConfig(adapter, vocabulary, _accuracy(accuracy, num_heads))


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef")


def _vocabulary(value: Any, vocab_size: int) -> tuple[int, ...] | None:
    if value is None:
        return None
    ids = value if isinstance(value, list) and all(type(token) is int for token in value) else []
    if not ids or any(after <= before for before, after in pairwise(ids)):
        raise HeadsConfigError(f"{CONFIG_FILE}: draft_vocabulary: expected ascending token ids, or null")
    if ids[0] < 0 or ids[-1] >= vocab_size:
        raise HeadsConfigError(
            f"{CONFIG_FILE}: draft_vocabulary: token ids go from 0 to {vocab_size - 1} with this base, "
            f"got {ids[0]} to {ids[-1]}"
        )
    return tuple(ids)


def _accuracy(value: Any, num_heads: int) -> tuple[tuple[float, ...], ...]:
    expected = f"{CONFIG_FILE}: accuracy: expected for each of {num_heads} heads 1 to {RANKS} shares from 0 to 1"
    if not isinstance(value, list) or len(value) != num_heads:
        raise HeadsConfigError(expected)
    for of_head in value:
        if not isinstance(of_head, list) or not 1 <= len(of_head) <= RANKS:
            raise HeadsConfigError(expected)
        if any(type(share) not in {int, float} or not 0 <= share <= 1 for share in of_head):
            raise HeadsConfigError(expected)
    return tuple(tuple(float(share) for share in of_head) for of_head in value)
